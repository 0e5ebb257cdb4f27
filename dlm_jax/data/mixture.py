"""Several datasets as one stream, in fixed proportions. Every row has a closed form, so there is no state to save."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlm_jax.data.dataset import FULL_BATCH, Batches, Dataset, ProcessShard, read_batches, rows_per_shard
from dlm_jax.data.records import Record
from dlm_jax.errors import UserError
from dlm_jax.typing import Int, Int32, shape_checked

PERIOD = 1_000_000  # rows after which the proportions are exact, so weights are resolved to a millionth
Schedule = tuple[Int32[np.ndarray, " rows"], Int32[np.ndarray, " rows"]]


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Weighted datasets with one record length and one tokenizer. Training uses it exactly like a `Dataset`.

    The sources alternate as evenly as their weights allow, in an order that repeats every million rows and depends on
    the weights alone. Each source is reshuffled in each of its own epochs, so a small one may be seen many times while
    a large one is seen once.

    Raises `UserError` for datasets that do not fit together and for weights that are not positive.
    """

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]  # relative, one per dataset

    def __post_init__(self) -> None:
        for dataset in self.datasets[1:]:
            _check_alike(self.datasets[0], dataset)
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise UserError(f"the weights {self.weights} of a mixture must be positive; drop a source you do not want")
        if len({dataset.directory for dataset in self.datasets}) < len(self.datasets):
            raise UserError("a mixture names the same directory twice; add up its weights")

    @property
    def directory(self) -> Path:
        """The directory of the first source, which represents all of them wherever they agree."""
        return self.datasets[0].directory

    @property
    def length(self) -> int:
        """Tokens per record."""
        return self.datasets[0].length

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each source: the last component of its path if those are distinct, else the full path."""
        short = tuple(dataset.directory.name for dataset in self.datasets)
        return short if len(set(short)) == len(short) else tuple(str(each.directory) for each in self.datasets)

    def batches(self, batch: int, seed: int, first_step: int = 0, shard: ProcessShard = FULL_BATCH) -> Batches:
        """As `Dataset.batches`: batch n depends on `seed`, n, the weights and the sources alone."""
        import grain
        rows = grain.MapDataset.source(_Rows(self, seed))
        yield from read_batches(rows, batch, first_step, shard)

    @shape_checked
    def sources(self, batch: int, step: int, shard: ProcessShard = FULL_BATCH) -> Int32[np.ndarray, " rows"]:
        """The source of each row of batch `step`, or of one shard of it, as an index into `names`: int32 [rows]."""
        index, _ = shard
        rows = rows_per_shard(batch, shard)
        first = step * batch + index * rows
        source, _ = self.schedule
        return source[np.arange(first, first + rows) % PERIOD]

    @functools.cached_property
    def schedule(self) -> Schedule:
        """For each row of a period, its source and its index within that source: int32 [PERIOD]."""
        return schedule(apportion(self.weights))


@shape_checked
def apportion(weights: Sequence[int | float]) -> Int[np.ndarray, " sources"]:
    """How many of PERIOD rows each source gets: int [sources]. Rounding leftovers go to the largest remainders.

    Raises `UserError` for a weight too small to get a single row.
    """
    exact = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[:PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise UserError(f"the weight {weights[int(np.argmin(counts))]} is less than a millionth of the mixture; raise "
                        "it or leave its source out")
    return counts


@shape_checked
def schedule(counts: Int[np.ndarray, " sources"]) -> Schedule:
    """For each of `sum(counts)` rows, its source and its index within that source: int32 [rows].

    Row j of the n rows of a source is due at (j + 1/2) / n of the period, and rows come in the order they are due.
    So at every row each source is close to its exact proportion.
    """
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    index = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    by_due_time = np.argsort((index + 0.5) / counts[source], kind="stable")
    return source[by_due_time], index[by_due_time]


class _Rows:
    """The endless rows of a mixture, as a random-access source: (tokens, segments), int32 [length]."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self._source, self._index = mixture.schedule
        self._counts = apportion(mixture.weights)
        self._streams = [dataset.stream(seed + number) for number, dataset in enumerate(mixture.datasets)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> Record:
        period, offset = divmod(row, PERIOD)
        source = self._source[offset]
        return self._streams[source][int(period * self._counts[source] + self._index[offset])]


def _check_alike(first: Dataset, other: Dataset) -> None:
    for template, ours, theirs in (("records of {} tokens", first.length, other.length),
                                   ("the tokenizer {}", first.tokenizer, other.tokenizer)):
        if ours != theirs:
            raise UserError(f"{first.directory} has {template.format(ours)} and {other.directory} "
                            f"{template.format(theirs)}; prepare all texts of a mixture with one length and one "
                            "tokenizer")
