"""Text to ids on many cores: groups of texts go to processes, and their ids come back in the order of the groups."""

import collections
import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterable
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np

from dlm_jax.errors import UserError

AHEAD = 2  # groups under way for each process: one in work and one ready
Group = tuple[list[str], int]  # texts and their size in bytes
EncodedGroup = tuple[list[np.ndarray], int]  # their ids, each int32 [tokens], and the same size


def encode_in_processes(groups: Iterable[Group], backend: Any, processes: int) -> Generator[EncodedGroup, None, None]:
    """The ids of each group, as `backend`, a `tokenizers.Tokenizer`, cuts its texts.

    What comes out does not depend on `processes`, and memory does not grow with the number of groups. Processes start
    as they are needed and end with the generator, or with this process, however it ends. Raises `UserError` where one
    of them is killed.
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
        raise UserError("a process that cuts text into tokens was killed, most likely for want of memory; take fewer "
                        "processes") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(pool: concurrent.futures.Executor, texts: list[str]) -> concurrent.futures.Future:
    """Hands on a group. A process that this starts must not hear Ctrl-C before it can ignore it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_encode, texts)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _result(future: concurrent.futures.Future, size: int) -> EncodedGroup:
    ids, lengths = future.result()
    return np.split(ids, np.cumsum(lengths[:-1])), size


_backend: Any = None  # in a process of the pool: what it cuts text with


def _start(backend: Any) -> None:
    """Prepares a process of the pool. Ctrl-C is for its parent, whose end, by kill -9 too, is its own."""
    global _backend
    _backend = backend
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core: threads would only get in each other's way
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The ids of all texts one after the other, int32 [tokens], and how many each text has, [texts]: two arrays pass
    between processes faster than many."""
    encodings = _backend.encode_batch_fast(texts, add_special_tokens=False)
    each = [np.array(encoding.ids, np.int32) for encoding in encodings]
    return np.concatenate(each), np.array([ids.size for ids in each])
