"""Batches as a training step takes them: arrays of the global batch, on the devices."""

import contextlib
from collections.abc import Generator

import jax
import numpy as np

from dlm_jax.config import Config
from dlm_jax.data.dataset import Dataset
from dlm_jax.data.mixture import Mixture
from dlm_jax.parallel.mesh import global_batch, process_shard
from dlm_jax.training.goodput import GoodputClock

Batch = tuple[jax.Array | np.ndarray, ...]  # tokens, segments int32 [b, n]; with a mixture, sources int32 [b]


def device_batches(config: Config, training: Dataset | Mixture, start: int,
                   clock: GoodputClock) -> Generator[Batch, None, None]:
    """Batches `start`, `start + 1`, ... without end. The wait for records is charged to the clock as `data`.

    Each process reads only its own rows. Records are read ahead in the background until the iterator is closed.
    """
    size = config.train.global_batch_size
    with contextlib.closing(training.batches(size, config.train.seed, start, process_shard(size))) as local_batches:
        for number, local in enumerate(local_batches, start):
            rows = (*local, *local_sources(config, training, number))
            clock.spend("data")
            yield tuple(global_batch(array, size) for array in rows)


def example_batch(config: Config, training: Dataset | Mixture) -> Batch:
    """A batch of zeros with the shapes and the layout of `device_batches`."""
    size = config.train.global_batch_size
    records = np.zeros((size // process_shard(size)[1], training.length), np.int32)
    rows = (records, records, *local_sources(config, training, 0))
    return tuple(global_batch(array, size) for array in rows)


def local_sources(config: Config, training: Dataset | Mixture, number: int) -> tuple[np.ndarray, ...]:
    """The source of each of this process's records in batch `number` (from 0), if there are several sources."""
    if len(training.names) == 1:
        return ()
    size = config.train.global_batch_size
    return (training.sources(size, number, process_shard(size)),)
