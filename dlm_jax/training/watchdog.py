"""What watches over a run: requests to stop, and steps that hang."""

import contextlib
import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

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
