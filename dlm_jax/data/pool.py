"""Tokenizes on many cores: groups of texts go to worker processes, and their ids come back in order.

Each worker process is served by a thread of this process, over a pipe that only the two of them hold. So a worker that
is killed, even halfway through a message, is noticed at once, and so is the end of this process by its workers. A
`ProcessPoolExecutor` shares one pipe among all workers, and waits forever for the rest of such a message.
"""

import collections
import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import numpy as np

from dlm_jax.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

AHEAD = 2  # groups in flight per process: one being tokenized, one waiting
Group = tuple[list[str], int]  # texts and their total size in bytes
EncodedGroup = tuple[list[np.ndarray], int]  # the ids of each text, int32 [tokens], and the same size


def encode_in_processes(groups: Iterable[Group], backend: "Backend",
                        processes: int) -> Generator[EncodedGroup, None, None]:
    """The ids of each group, as tokenized by `backend`.

    The result does not depend on `processes`, and memory does not grow with the number of groups. Worker processes
    start on demand and end with the generator, or with this process, however it ends.

    Raises `UserError` if a worker process is killed.
    """
    workers = _Workers(backend)
    waiting: collections.deque[tuple[concurrent.futures.Future, int]] = collections.deque()
    threads = concurrent.futures.ThreadPoolExecutor(processes)
    try:
        for texts, size in groups:
            waiting.append((threads.submit(workers.encode, texts), size))
            if len(waiting) > AHEAD * processes:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        threads.shutdown(cancel_futures=True)
        workers.close()


def _result(future: concurrent.futures.Future, size: int) -> EncodedGroup:
    ids, lengths = future.result()
    return np.split(ids, np.cumsum(lengths[:-1])), size


class _Workers:
    """A worker process for each thread that calls `encode`."""

    def __init__(self, backend: "Backend"):
        self._backend = backend
        self._thread = threading.local()
        self._pipes: list[Connection] = []

    def encode(self, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """What `_encode` returns in this thread's worker. Raises `UserError` if that is killed."""
        if not hasattr(self._thread, "pipe"):
            self._thread.pipe = self._start()
        try:
            self._thread.pipe.send(texts)
            return self._thread.pipe.recv()
        except (EOFError, ConnectionError) as error:
            raise UserError("a tokenizer process was killed, most likely for lack of memory; "
                            "use fewer processes") from error

    def _start(self) -> Connection:
        """A pipe to a new worker. SIGINT is blocked in this thread, and so in the worker from its first instruction."""
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._pipes.append(ours)
        with theirs:
            context.Process(target=_serve, args=(theirs, self._backend), daemon=True).start()
        return ours

    def close(self) -> None:
        """Ends the workers, each at once or after the group it is at."""
        for pipe in self._pipes:
            pipe.close()


def _serve(pipe: Connection, backend: "Backend") -> None:
    """A worker process: tokenizes until the other end of the pipe is closed. It leaves Ctrl-C to its parent."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core; threads would only compete
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(_encode(backend, pipe.recv()))


def _encode(backend: "Backend", texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts concatenated, int32 [tokens], and the length of each, [texts]. Two arrays pass between
    processes faster than many."""
    encodings = backend.encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
    return np.concatenate(ids), np.array([text_ids.size for text_ids in ids])
