"""What watches over a run: requests to stop, steps that hang, and profiles of what the devices do."""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax


@contextlib.contextmanager
def termination() -> Iterator[Callable[[int], bool]]:
    """Yields a function that returns, after step n, whether the run should stop there.

    It should once it has received a SIGTERM, which clusters send before they reclaim a machine. Several processes all
    stop at the same step, which JAX's preemption service chooses.
    """
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        yield multihost_utils.reached_preemption_sync_point
        return
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a signal handler
        yield lambda step: False
        return
    requested = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: requested.set())
    try:
        yield lambda step: requested.is_set()
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[], None]]:
    """Yields a function to be called after every step. Whenever it is not called for `seconds`, the stacks of all
    threads are dumped on stderr; 0: never."""
    if not seconds:
        yield lambda: None
        return
    armed = -seconds

    def alive() -> None:
        nonlocal armed
        now = time.monotonic()
        if now - armed > seconds / 100:  # arming starts a thread, which is too slow to do after every step
            faulthandler.dump_traceback_later(seconds, repeat=True, file=sys.__stderr__ or 2)
            armed = now

    try:
        yield alive
    finally:
        faulthandler.cancel_dump_traceback_later()


class Profile:
    """A profile of some steps of a run, for TensorBoard or Perfetto, in the directory `out`. None: no profile."""

    def __init__(self, out: Path, steps: tuple[int, int] | None) -> None:
        self._out, self._steps, self._running = out, steps, False

    def before(self, step: int) -> None:
        """To be called before a step."""
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._running:
            jax.profiler.start_trace(str(self._out))
            self._running = True

    def after(self, step: int, result: object) -> None:
        """To be called after a step is dispatched, with what it returns."""
        if self._running and self._steps and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what has been recorded."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
