"""Several datasets as one stream, in given proportions: every row has a closed form, so there is no state to keep."""

import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dlm_jax.data.dataset import ALL, Batches, Dataset, Share, read_batches, rows_of_share
from dlm_jax.errors import UserError

PERIOD = 1_000_000  # rows after which every source has had its exact share: weights hold to a millionth


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Datasets of one length and one tokenizer, each with its weight; offers what training uses of a `Dataset`.

    The sources alternate as evenly as their weights allow, in an order that repeats every million rows and depends on
    the weights alone. Each source is reshuffled in each of its own epochs, so a small one may be seen many times while
    a large one is seen once.

    Raises `UserError` for datasets that do not fit together and for weights that are not positive.
    """

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        for dataset in self.datasets[1:]:
            _check_alike(self.datasets[0], dataset)
        if not all(0 < weight < float("inf") for weight in self.weights):
            raise UserError(f"the weights {self.weights} of a mixture must be positive; leave out what has none")
        if len({dataset.directory for dataset in self.datasets}) < len(self.datasets):
            raise UserError("a mixture names the same directory twice; add up its weights")

    @property
    def directory(self) -> Path:
        """That of the first source, which stands for all where they are alike."""
        return self.datasets[0].directory

    @property
    def length(self) -> int:
        """Tokens of a record."""
        return self.datasets[0].length

    @property
    def names(self) -> tuple[str, ...]:
        """What each source is called: the last part of its path where those differ, else the whole path."""
        short = tuple(dataset.directory.name for dataset in self.datasets)
        return short if len(set(short)) == len(short) else tuple(str(each.directory) for each in self.datasets)

    def batches(self, batch: int, seed: int, first_step: int = 0, share: Share = ALL) -> Batches:
        """As `Dataset.batches`: batch number n, or a share of it, depends on `seed`, n, weights and sources alone."""
        import grain
        rows = grain.MapDataset.source(_Rows(self, seed))
        yield from read_batches(rows, batch, first_step, share)

    def sources(self, batch: int, step: int, share: Share = ALL) -> np.ndarray:
        """The number in `names` of the source of each row of batch `step`, or of a share of it: int32 [rows]."""
        rows = rows_of_share(batch, share)
        first = step * batch + share[0] * rows
        return self.schedule[0][np.arange(first, first + rows) % PERIOD]

    @functools.cached_property
    def schedule(self) -> tuple[np.ndarray, np.ndarray]:
        """For each row of a period its source, and how many rows of the period this source has had before: int32
        [PERIOD]."""
        return schedule(apportion(self.weights))


def apportion(weights: Sequence[float]) -> np.ndarray:
    """How many of PERIOD rows each source gets: int [sources]. What rounding leaves goes to the largest remainders.

    Raises `UserError` for a weight that is too small for any.
    """
    exact = np.asarray(weights, np.float64) / np.sum(weights, dtype=np.float64) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[:PERIOD - counts.sum()]] += 1
    if not counts.all():
        raise UserError(f"the weight {weights[int(np.argmin(counts))]} is less than a millionth of the mixture; raise "
                        "it or leave its source out")
    return counts


def schedule(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which source each of `sum(counts)` rows is from, and the how-manieth of its source it is: int32 [rows].

    Row j of the n rows of a source is due at (j + 1/2) / n of the period, and rows come in the order they are due:
    so at any row no source is far ahead of its share or behind it.
    """
    source = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    place = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
    order = np.argsort((place + 0.5) / counts[source], kind="stable")
    return source[order], place[order]


class _Rows:
    """The rows of a mixture without end, as a random-access source: (tokens, segments), int32 [length]."""

    def __init__(self, mixture: Mixture, seed: int) -> None:
        self._source, self._place = mixture.schedule
        self._counts = apportion(mixture.weights)
        self._streams = [dataset.stream(seed + number) for number, dataset in enumerate(mixture.datasets)]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        period, within = divmod(row, PERIOD)
        source = self._source[within]
        return self._streams[source][int(period * self._counts[source] + self._place[within])]


def _check_alike(first: Dataset, other: Dataset) -> None:
    for what, ours, theirs in (("records of {} tokens", first.length, other.length),
                               ("the tokenizer {}", first.tokenizer, other.tokenizer)):
        if ours != theirs:
            raise UserError(f"{first.directory} has {what.format(ours)} and {other.directory} {what.format(theirs)}; "
                            "prepare the texts of a mixture with one length and one tokenizer")
