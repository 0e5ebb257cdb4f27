"""Tokenizes on many cores: groups of texts go to worker processes, and their ids come back in order."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
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
    pool = concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), _start, (backend,))
    waiting: collections.deque[tuple[concurrent.futures.Future, int]] = collections.deque()
    try:
        for texts, size in groups:
            waiting.append((_submit(pool, texts), size))
            if len(waiting) > AHEAD * processes:
                yield _result(*waiting.popleft())
        while waiting:
            yield _result(*waiting.popleft())
    except BrokenProcessPool as error:
        raise UserError("a tokenizer process was killed, most likely for lack of memory; "
                        "use fewer processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: concurrent.futures.Executor, texts: list[str]) -> concurrent.futures.Future:
    """Submits a group, with SIGINT blocked: a worker started here must not get Ctrl-C before it can ignore it."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def _result(future: concurrent.futures.Future, size: int) -> EncodedGroup:
    ids, lengths = future.result()
    return np.split(ids, np.cumsum(lengths[:-1])), size


_backend: "Backend"  # set by `_start` in each worker process


def _start(backend: "Backend") -> None:
    """Initializes a worker process. It leaves Ctrl-C to its parent, and ends when its parent does, even by kill -9."""
    global _backend
    _backend = backend
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process per core; threads would only compete
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts concatenated, int32 [tokens], and the length of each, [texts]. Two arrays pass between
    processes faster than many."""
    encodings = _backend.encode_batch_fast(texts, add_special_tokens=False)
    ids = [np.array(encoding.ids, np.int32) for encoding in encodings]
    return np.concatenate(ids), np.array([text_ids.size for text_ids in ids])
