"""What watches over a run: requests to end it, steps that do not end, and a look at what the devices do."""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields a function that tells, after step n, whether the run is to end there: since a SIGTERM, as clusters send it
    before they take a machine. Of several processes all learn it at the same step, by JAX's preemption service."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        yield multihost_utils.reached_preemption_sync_point
        return
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # where no handler can be set
        yield lambda step: False
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield lambda step: asked.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Yields a function to be called after every step. Where it is not for `seconds`, the stacks of all threads go to
    stderr, again and again; 0: never."""
    if not seconds:
        yield lambda: None
        return
    armed = -seconds

    def alive() -> None:
        nonlocal armed
        now = time.monotonic()
        if now - armed > seconds / 100:  # arming makes a thread, which not every step need pay
            faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__ or 2)
            armed = now

    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


class Trace:
    """A profile of steps `first` to `last` of a run for TensorBoard or Perfetto, in the directory `out`."""

    def __init__(self, out: Path, first: int, last: int) -> None:
        self._out, self._first, self._last, self._on = out, first, last, False

    def before(self, step: int) -> None:
        """Step `step` is next."""
        if self._first <= step <= self._last and not self._on:
            jax.profiler.start_trace(str(self._out))
            self._on = True

    def after(self, step: int, result: Any) -> None:
        """Step `step` was handed over, and `result` is of it."""
        if self._on and step >= self._last:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what there is."""
        if self._on:
            self._on = False
            jax.profiler.stop_trace()
