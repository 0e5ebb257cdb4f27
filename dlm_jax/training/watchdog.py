"""What watches over a run: requests to stop, and steps that hang."""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Whether somebody asked the run to stop. SIGTERM asks, which clusters send before they reclaim a machine, and so
    does the first Ctrl-C; the second one ends the process at once."""

    def __init__(self) -> None:
        self.signal = int(signal.SIGTERM)  # the one that asked
        self._requested = threading.Event()

    def at(self, step: int) -> bool:
        """Whether to stop after step `step`. To be called after every step."""
        return self._requested.is_set()

    def receive(self, number: int, frame: object) -> None:
        """The handler of both signals."""
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, b"dlm: stopping after this step; press Ctrl-C again to stop at once, without saving\n")
        self.signal = number
        self._requested.set()


class SharedStopRequest(StopRequest):
    """The request to stop of a run of several processes, which stop at the same step: JAX's preemption service chooses
    it when one of them receives a SIGTERM."""

    def at(self, step: int) -> bool:
        """Whether to stop after step `step`. To be called after every step, by all processes."""
        return multihost_utils.reached_preemption_sync_point(step)

    def receive(self, number: int, frame: object) -> None:
        """The handler of SIGINT, which becomes the SIGTERM that the service waits for."""
        super().receive(number, frame)
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Listens for requests to stop. Only a main thread can; in others a run is stopped by whoever started it."""
    shared = jax.process_count() > 1
    request = SharedStopRequest() if shared else StopRequest()
    numbers = (signal.SIGINT,) if shared else (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
