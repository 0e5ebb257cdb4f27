"""Where the lock of a work directory is kept: a file in a local directory, or an object in a store."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Protocol

from dlm_jax.errors import UserError
from dlm_jax.files import reachable
from dlm_jax.runs.store import store_of
from dlm_jax.schema.json_text import read_regular

LOCK = "lock"  # the name of the file or object
MAX_LOCK = 2**16  # bytes of it


class Place(Protocol):
    """Where a lock is kept. `OSError` or `UserError` where it cannot be read or written."""

    name: str  # of the work directory
    kernel: bool  # whether this process holds the kernel's lock, which the kernel frees when the process dies

    def read(self) -> str | None:
        """The text of the lock: empty while a process begins to write it, None if there is no lock."""

    def write(self, text: str) -> None:
        """Replaces the text."""

    def close(self, remove: bool) -> None:
        """Gives up the place; `remove`: also the lock, and the work directory if it was made for it and is empty."""


class LockFile:
    """A file in a local directory, which is made if it is missing.

    Raises `BlockingIOError` if another process has the kernel's lock, else `OSError` if the file cannot be written.
    """

    def __init__(self, directory: Path) -> None:
        self.name, self._path, self._made = str(directory), directory / LOCK, not directory.exists()
        while True:  # until the locked file is the one in the directory: its last holder may just have removed it
            directory.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as stack:
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
                stack.callback(os.close, self._descriptor)
                self.kernel = _flock(self._descriptor)
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):
                    stack.pop_all()
                    return

    def read(self) -> str | None:
        """See `Place`."""
        return read_lock(self._path.parent)

    def write(self, text: str) -> None:
        """See `Place`. The file is closed each time, which shows its text to other machines."""
        with open(os.open(self._path, os.O_WRONLY | os.O_NOFOLLOW), "w", encoding="utf-8") as file:
            file.write(text)
            file.truncate()

    def close(self, remove: bool) -> None:
        """See `Place`."""
        with contextlib.suppress(OSError):
            if remove:
                self._path.unlink()
            if self._made:
                self._path.parent.rmdir()
        os.close(self._descriptor)


def _flock(descriptor: int) -> bool:
    """Takes the kernel's lock, and returns False where the file system has none. Raises `BlockingIOError`."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


def read_lock(directory: Path) -> str | None:
    """The text of the lock in a local directory, or None if there is none."""
    try:
        return read_regular(directory / LOCK, MAX_LOCK).decode(errors="replace")
    except FileNotFoundError:
        return None


class LockObject:
    """An object in a store. Raises `UserError` if the store cannot be reached."""

    kernel = False

    def __init__(self, url: str) -> None:
        self.name = url
        self._store, self._directory = store_of(url)
        self._path = f"{self._directory}/{LOCK}"
        with reachable(url):
            self._made = not self._store.exists(self._directory)

    def read(self) -> str | None:
        """See `Place`."""
        with reachable(self.name):
            try:
                return self._store.cat_file(self._path).decode(errors="replace")
            except FileNotFoundError:
                return None

    def write(self, text: str) -> None:
        """See `Place`."""
        with reachable(self.name):
            self._store.makedirs(self._directory, exist_ok=True)
            self._store.pipe_file(self._path, text.encode())

    def close(self, remove: bool) -> None:
        """See `Place`."""
        with contextlib.suppress(UserError), reachable(self.name):
            if remove:
                self._store.rm_file(self._path)
            if self._made:
                self._store.rmdir(self._directory)
