"""Work directories in a store of objects, such as gs://bucket/run: checkpoints go there by themselves, and the few
small files of a run are written here and copied there."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dlm_jax.cluster import leads
from dlm_jax.errors import UserError
from dlm_jax.files import is_remote, reachable, write_text

POINTER = "remote"  # a file that says where the directory that it is in belongs
HERE = {POINTER, "checkpoints", "data", "compiled", "profile"}  # what is not copied


@contextlib.contextmanager
def mirrored(workdir: str | Path) -> Iterator[Path]:
    """A directory of this machine for a run in `workdir`, which where it is local is itself. What the run leaves in it
    is copied at the end; `push` does it in between. Each process has its own. Raises `UserError` where the store cannot
    be reached or holds something else."""
    if not is_remote(workdir):
        yield Path(workdir)
        return
    import jax
    here = fetch(str(workdir), f"process{jax.process_index()}")
    try:
        yield here
    finally:
        push(here)


def fetch(url: str, part: str = "read") -> Path:
    """The small files of a remote work directory, copied here anew. Its checkpoints are read where they are."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dlm-jax" / "runs"
    here = cache / hashlib.sha256(url.rstrip("/").encode()).hexdigest()[:16] / part
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir(parents=True)
    with reachable(url):
        store, path = store_of(url)
        entries = store.ls(path, detail=False) if store.exists(path) else []
    names = [entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries]
    if names and "config.json" not in names:
        raise UserError(f"{url} is not empty and holds no run; name a new directory or that of a run")
    with reachable(url):
        for name in set(names) - HERE:
            store.get(f"{path}/{name}", str(here / name), recursive=True)
    write_text(here / POINTER, url.rstrip("/"))
    return here


def push(here: Path) -> None:
    """Copies the small files of a run to where they belong, from its first process; nothing where that is here."""
    if not leads() or not (here / POINTER).is_file() or not (here / "config.json").is_file():
        return
    url = (here / POINTER).read_text()
    with reachable(url):
        store, path = store_of(url)
        store.makedirs(path, exist_ok=True)
        for file in here.rglob("*"):
            if file.is_file() and file.relative_to(here).parts[0] not in HERE:
                there = f"{path}/{file.relative_to(here).as_posix()}"
                store.makedirs(there.rsplit("/", 1)[0], exist_ok=True)
                store.put_file(str(file), there)


def checkpoints_of(workdir: Path) -> Any:
    """Where the checkpoints of a work directory are: a path that knows its store."""
    from etils import epath
    pointer = workdir / POINTER
    place = epath.Path(pointer.read_text().removeprefix("file://") if pointer.is_file() else workdir.absolute())
    return place / "checkpoints"


def store_of(url: str) -> tuple[Any, str]:
    """The store of a URL and the path in it."""
    from fsspec.core import url_to_fs
    return url_to_fs(url.rstrip("/"))
