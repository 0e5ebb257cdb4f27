"""Work directories in an object store, such as gs://bucket/run: Orbax writes the checkpoints there directly; the few
small files of a run are written to a local mirror and copied.

Only a URL that the caller names makes a directory a mirror, and only in that process: no file in it says so.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from dlm_jax.errors import UserError
from dlm_jax.files import is_remote, reachable
from dlm_jax.parallel.distributed import barrier, is_primary
from dlm_jax.runs.lock import check_lock, locked
from dlm_jax.runs.places import LOCK
from dlm_jax.runs.store import check_url, names_at, store_of

if TYPE_CHECKING:
    from etils import epath

NOT_COPIED = {LOCK, "checkpoints", "data", "compiled", "profile"}

_urls: dict[Path, str] = {}  # mirror -> what it mirrors, for the mirrors that this process has made


@contextlib.contextmanager
def mirrored(workdir: str | Path) -> Iterator[Path]:
    """The local directory of a run in `workdir`: itself if that is local, else a mirror, one per process.

    No other run can use the store while the block runs. The mirror's files are copied to the store when it ends; `push`
    copies them in between. Raises `UserError` if the store is in use, cannot be reached, or holds something other than
    a run.
    """
    if not is_remote(workdir):
        yield Path(workdir)
        return
    import jax
    url, reader = str(workdir), f"process{jax.process_index()}"
    _check_run(url)
    with locked(mirror_of(url, reader), url) if is_primary() else contextlib.nullcontext():
        barrier("locked")  # the mirrors of another run's processes are left alone until it has ended
        mirror = fetch(url, reader)
        try:
            yield mirror
        finally:
            push(mirror)


def mirror_of(url: str, reader: str) -> Path:
    """Where the mirror of a URL is; those of different `reader`s do not touch each other."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm-jax" / "runs"
    return cache / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16] / reader


def is_mirror(workdir: Path) -> bool:
    """Whether a directory is a mirror that this process has made."""
    return workdir in _urls


def fetch(url: str, reader: str = "read") -> Path:
    """A new local mirror of a remote work directory, with its small files; checkpoints are read from the store.

    Raises `UserError` if the store cannot be reached or holds something other than a run.
    """
    names = _check_run(url)
    mirror = mirror_of(url, reader)
    shutil.rmtree(mirror, ignore_errors=True)
    mirror.mkdir(parents=True)
    store, path = store_of(url)
    with reachable(url):
        for name in names - NOT_COPIED:
            store.get(f"{path}/{name}", str(mirror / name), recursive=True)
    _urls[mirror] = url.rstrip("/")
    return mirror


def _check_run(url: str) -> set[str]:
    """The names below a URL. Raises `UserError` if they are not those of a run, nor none."""
    check_url(url)
    names = names_at(url) - {LOCK}
    if names and "config.json" not in names:
        raise UserError(f"{url} is not empty and holds no run; name a new directory or that of a run")
    return names


def push(workdir: Path) -> None:
    """Copies the small files of a mirror to its store, from the primary process. A local work directory is left alone.

    Raises `UserError` if the store cannot be reached, or another run has taken over its lock.
    """
    if not is_primary() or not is_mirror(workdir) or not (workdir / "config.json").is_file():
        return
    check_lock(workdir)
    store, path = store_of(_urls[workdir])
    with reachable(_urls[workdir]):
        store.makedirs(path, exist_ok=True)
        for file in workdir.rglob("*"):
            name = file.relative_to(workdir)
            if file.is_file() and name.parts[0] not in NOT_COPIED:
                target = f"{path}/{name.as_posix()}"
                store.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
                store.put_file(str(file), target)


def checkpoints_of(workdir: Path) -> "epath.Path":
    """The directory of a run's checkpoints, local or in its store."""
    from etils import epath
    home = _urls.get(workdir, str(workdir.absolute()))
    return epath.Path(store_of(home)[1] if home.startswith("file://") else home) / "checkpoints"
