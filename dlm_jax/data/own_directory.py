"""A new directory that belongs to one running process; those of processes that were killed are removed."""

import contextlib
import fcntl
import glob
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from dlm_jax.files import new_directory


@contextlib.contextmanager
def own_directory(out: str | Path) -> Iterator[Path]:
    """`files.new_directory`, after what killed processes have left of it is removed.

    A lock that the system takes back when a process ends, however it ends, tells the living from the dead.
    """
    _remove_dead(Path(out))
    with new_directory(out) as directory, _handle(directory) as handle:
        with contextlib.suppress(OSError):  # a file system without locks: the directory looks alive for ever
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield directory


def _remove_dead(out: Path) -> None:
    for partial in out.parent.glob(f".{glob.escape(out.name)}.*.partial"):
        # Locked by the living, of another user, or on a file system without locks: it is left alone.
        with contextlib.suppress(OSError), _handle(partial) as handle:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def _handle(directory: Path) -> Iterator[int]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        yield handle
    finally:
        os.close(handle)
