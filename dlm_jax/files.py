"""Files and directories that are written completely or not at all, and whose damage is noticed."""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dlm_jax.errors import UserError
from dlm_jax.schema.json_text import parse_json, read_regular, shown

SUMS = "SHA256SUMS"  # in a model directory: the digests of its files, as the command sha256sum writes them
MAX_SUMS = 2**24  # bytes of that file
SUM = re.compile(r"([0-9a-f]{64}) [ *](?:\./)?(.+)")


def check_new(out: str | Path) -> None:
    """Raises `UserError` if `out` exists and is not an empty directory: better before long work than after it."""
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} already exists and is not an empty directory; name a new one or remove it")


@contextlib.contextmanager
def new_directory(out: str | Path) -> Iterator[Path]:
    """A temporary directory beside `out` that becomes `out` if the block succeeds, and is deleted if it fails.

    What killed processes left beside `out` is deleted first. The files are on disk before the directory gets its name,
    so not even a power failure leaves an incomplete `out`. Raises `UserError` if `out` exists and is not an empty
    directory, and for a full disk or an unwritable path.
    """
    out = Path(out)
    check_new(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        with _locked_directory(out) as temporary:
            yield temporary
            temporary.chmod(0o755)
            for path in (*temporary.rglob("*"), temporary):
                _sync(path)
            temporary.replace(out)
            with contextlib.suppress(PermissionError):  # it may be writable but not readable
                _sync(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; free space or name a writable "
                        "path") from error


def _remove_leftovers(out: Path) -> None:
    """Deletes what killed processes left: the system releases a process's lock however the process ends."""
    for partial in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        # An error means in use, another user's, or on a file system without locks: leave it alone.
        with contextlib.suppress(OSError), _opened(partial) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _locked_directory(out: Path) -> Iterator[Path]:
    """A new directory beside `out`, locked while the block runs; at its end what is left of it is deleted."""
    while True:
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
        lock = _lock(temporary)
        if lock is not None:
            break
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(lock)


def _lock(directory: Path) -> int | None:
    """A handle that locks a new directory, or None if another process took it for a leftover before it was locked."""
    try:
        handle = os.open(directory, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # on a file system without locks the directory always looks in use
        fcntl.flock(handle, fcntl.LOCK_EX)
    if directory.exists():
        return handle
    os.close(handle)
    return None


def _sync(path: Path) -> None:
    """Waits until a file's contents, or a directory's list of files, are on disk, where the file system can tell."""
    with _opened(path) as handle:
        try:
            os.fsync(handle)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    handle = os.open(path, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replaces the file at `path` atomically. Raises `OSError`, and then leaves the previous file in place."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def is_remote(name: str | Path) -> bool:
    """Whether a name is a URL, such as gs://bucket/run."""
    return "://" in str(name)


@contextlib.contextmanager
def reachable(name: str) -> Iterator[None]:
    """Turns whatever fsspec and the packages behind it raise into a `UserError`."""
    try:
        yield
    except ImportError as error:
        package = {"gs": "gcsfs", "gcs": "gcsfs", "s3": "s3fs"}.get(name.split("://")[0])
        fix = f"pip install {package}" if package else "install it"
        raise UserError(f"{name} needs a package that is not installed ({error}); {fix}") from error
    except Exception as error:  # every store raises its own: no network, no permission, unknown protocol
        raise UserError(f"cannot reach {name} ({type(error).__name__}: {error}); check the name, the network and your "
                        "permissions") from error


def describe(error: OSError) -> str:
    """The cause and the file name, without the error number."""
    file = f" ({error.filename})" if error.filename else ""
    return f"{error.strerror or error}{file}"


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` if it is missing, unreadable, not strictly JSON (`parse_json`), or
    not an object."""
    try:
        fields = parse_json(read_regular(path))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}; name a checkpoint directory") from None
    except (OSError, ValueError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(fields, dict):
        raise UserError(f"{path} does not hold a JSON object; copy or download it again")
    return fields


def write_sums(directory: Path) -> None:
    """Writes the SHA-256 of every file in `directory` into its `SHA256SUMS`, which `sha256sum --check` reads, too."""
    files = sorted(path for path in directory.iterdir() if path.is_file() and path.name != SUMS)
    lines = [f"{digest}  {file.name}\n" for file, digest in zip(files, _digests(files))]
    write_text(directory / SUMS, "".join(lines))


def check_sums(directory: Path, names: Iterable[str], required: bool = False) -> None:
    """Compares the files called `names`, those that exist, with `SHA256SUMS`, if the directory has it.

    required: it must exist and list all of them. Raises `UserError` naming the file that is damaged or not listed.
    """
    files = [directory / name for name in sorted(set(names)) if (directory / name).is_file()]
    listed = _read_sums(directory / SUMS)
    unlisted = [file.name for file in files if file.name not in listed]
    if required and unlisted:
        raise UserError(f"{directory / SUMS} does not list {unlisted[0]}, so damage would go unnoticed; copy the "
                        "entire directory again")
    files = [file for file in files if file.name in listed]
    for file, digest in zip(files, _digests(files)):
        if digest != listed[file.name]:
            raise UserError(f"{file} is damaged: it differs from its checksum in {SUMS}; copy or download it again, or "
                            "run sha256sum again if you changed it")


def _read_sums(path: Path) -> dict[str, str]:
    """The digests by file name; none if there is no such file. Raises `UserError` for a line that cannot be read."""
    if not path.exists():
        return {}
    lines = read_regular(path, MAX_SUMS).decode(errors="replace").splitlines()
    for line in lines:
        if not SUM.fullmatch(line):
            raise UserError(f"{path} is damaged: it has the line {shown(line)}; copy it again, or write it with "
                            "sha256sum")
    return {match[2]: match[1] for line in lines if (match := SUM.fullmatch(line))}


def _digests(files: Sequence[Path]) -> list[str]:
    """The SHA-256 of each file, in hex digits."""
    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor() as threads:
        return list(threads.map(digest, files))
