"""One writer at a time: a training process holds the lock of its work directory while it runs.

The lock is a file or an object, `lock`, whose JSON says who holds it. It is removed when the run ends, and remains when
the run is killed. The holder rewrites it every BEAT seconds.

Within a machine the kernel keeps two runs apart, and frees the lock of a process that dies. It does not in an object
store, nor across machines on many shared file systems. There a lock is watched before it is taken over, and its holder
counts as dead after SILENCE seconds without a beat. That needs no common clock, but machines of different names, and
it cannot tell a dead holder from one that is suspended or cut off for that long. Such a holder, once it is back, and
the loser of two runs that begin within a second, may still write lines of a log: but no checkpoint, because the lock
is read again before each (`check_lock`).
"""

import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from dlm_jax.errors import UserError
from dlm_jax.runs.places import LOCK, LockFile, LockObject, Place, read_lock
from dlm_jax.schema.json_text import parse_json
from dlm_jax.schema.record import from_json

BEAT = 10.0
SILENCE = 90.0
SETTLE = 1.0  # seconds after which a lock that the kernel does not keep is read back: two runs may have written it


@dataclasses.dataclass(frozen=True)
class Holder:
    """Who holds a lock."""

    pid: int
    host: str
    started: str  # when it took the lock: UTC, ISO 8601
    kernel: bool  # whether the kernel of `host` frees the lock when the process dies

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {str(self.started)[:19].replace('T', ' ')} UTC"


def parse(text: str | None) -> Holder | None:
    """The holder that the text of a lock names, or None."""
    try:
        fields = parse_json((text or "").encode())
        return from_json(Holder, {field.name: fields[field.name] for field in dataclasses.fields(Holder)}, LOCK)
    except (ValueError, TypeError, KeyError, UserError):
        return None


class Lock:
    """The lock at `place`, to be held by this process."""

    def __init__(self, place: Place) -> None:
        self._place, self._beats = place, 0
        self._me = Holder(os.getpid(), socket.gethostname(), datetime.now(UTC).isoformat(), place.kernel)

    def take(self) -> None:
        """Writes the lock. Raises `UserError` if another run holds it or it is something else, `OSError` if the disk is
        full."""
        text = self._place.read()
        holder = parse(text)
        if text and holder is None:
            raise UserError(f"the file {LOCK} in {self._place.name} is not the lock of a run; name another directory")
        if text and holder and not self._was_freed(holder) and self._is_alive(text, holder):
            raise in_use(self._place.name, holder)
        self._write()
        if not self._place.kernel:
            time.sleep(SETTLE)
            self.check()

    def _was_freed(self, holder: Holder) -> bool:
        """Whether the kernel vouches that this holder is dead."""
        return self._place.kernel and holder.kernel and holder.host == self._me.host

    def _is_alive(self, text: str, holder: Holder) -> bool:
        """Whether a lock of this text changes within SILENCE seconds. One that is removed is free."""
        print(f"{self._place.name} is locked by {holder}; waiting up to {SILENCE:.0f} s for a sign of life",
              file=sys.stderr)
        end, now = time.monotonic() + SILENCE, self._place.read()
        while now == text and time.monotonic() < end:
            time.sleep(BEAT / 4)
            now = self._place.read()
        return now not in (None, text)

    def _write(self) -> None:
        self._beats += 1
        self._place.write(json.dumps(dataclasses.asdict(self._me) | {"beats": self._beats}))

    def beat(self) -> None:
        """Rewrites the lock with another number, if it is still this run's and can be written."""
        with contextlib.suppress(OSError, UserError):
            if parse(self._place.read()) in (None, self._me):
                self._write()

    def check(self) -> None:
        """Raises `UserError` if another run has taken over the lock. One that cannot be read is taken to be held."""
        holder = None
        with contextlib.suppress(OSError, UserError):
            holder = parse(self._place.read())
        if holder not in (None, self._me):
            raise in_use(self._place.name, holder)

    def release(self) -> None:
        """Removes the lock if it is this run's, and what was made for it."""
        mine = False
        with contextlib.suppress(OSError, UserError):
            text = self._place.read()
            mine = parse(text) == self._me or (text == "" and self._place.kernel)
        self._place.close(remove=mine)


_held: dict[Path, Lock] = {}  # the locks of this process, by the local directory of the run


@contextlib.contextmanager
def locked(workdir: Path, url: str | None = None) -> Iterator[None]:
    """Holds the lock of the run whose local directory is `workdir`: in the store at `url`, else in that directory.

    The directory is made if it is missing, and removed if it is empty in the end. Raises `UserError` if another run
    holds the lock or the store cannot be reached, and `OSError` if the lock cannot be written.
    """
    try:
        lock = Lock(LockObject(url) if url else LockFile(workdir))
    except BlockingIOError:
        raise in_use(str(workdir), parse(read_lock(workdir))) from None
    try:
        lock.take()
        _held[workdir] = lock
        try:
            with _beating(lock):
                yield
        finally:
            _held.pop(workdir, None)
    finally:
        lock.release()


@contextlib.contextmanager
def _beating(lock: Lock) -> Iterator[None]:
    """Rewrites the lock every BEAT seconds during the block."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT):
            lock.beat()

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def check_lock(workdir: Path) -> None:
    """Raises `UserError` if this process held the lock of `workdir` and another run has taken it over."""
    if workdir in _held:
        _held[workdir].check()


def in_use(name: str, holder: Holder | None) -> UserError:
    """What to tell a user who begins a run in a work directory that another run holds."""
    return UserError(f"{name} is in use by {holder or 'another process'}; wait for that run to end, stop it, or name "
                     "another work directory")
