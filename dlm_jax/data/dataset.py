"""A prepared dataset: any batch of an endless, reshuffled stream, or any rows as they were written."""

import bisect
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlm_jax.data.records import DESCRIPTION, FORMAT, decode_record
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

if TYPE_CHECKING:
    import grain

READ_THREADS, READ_AHEAD = 2, 4  # batches read at once, and batches kept ready

Share = tuple[int, int]  # (i, n): of n equal runs of rows that a batch is cut into, number i. What process i of n reads
ALL: Share = (0, 1)
Batches = Generator[tuple[np.ndarray, np.ndarray], None, None]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of the dataset and the number of records it must hold."""

    name: str
    records: int


@dataclasses.dataclass(frozen=True)
class Dataset:
    """`records` records of `length` tokens, made by `prepare` with the tokenizer of this fingerprint.

    tokens: those that are not padding. documents, bytes: of the text they came from, the bytes in UTF-8.
    """

    directory: Path
    length: int
    records: int
    tokens: int
    documents: int
    bytes: int
    tokenizer: str
    bos_id: int | None
    eos_id: int | None
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, directory: str | Path) -> "Dataset":
        """Opens what `prepare` wrote. Raises `UserError` where that is not there, not whole, or of another format."""
        directory = Path(directory)
        try:
            fields = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
            if fields.pop("format") != FORMAT:
                raise UserError(f"{directory} has a format that this version of dlm-jax does not know; "
                                "prepare the text anew")
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            dataset = cls(directory=directory, shards=shards, **fields)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{directory} is not a prepared dataset ({DESCRIPTION}: {error}); "
                            "prepare the text into it first") from error
        for shard in shards:
            _check(directory / shard.name, shard.records)
        return dataset

    @property
    def names(self) -> tuple[str, ...]:
        """The one source that all rows are from; a `Mixture` has several."""
        return (self.directory.name,)

    def batches(self, batch: int, seed: int, first_step: int = 0, share: Share = ALL) -> Batches:
        """Batches `first_step`, `first_step + 1`, ... without end: (tokens, segments), int32 [batch, length].

        Batch number n depends on `seed` and n alone. Each run through the dataset visits every record once, in a new
        order; a batch may span two runs. With a `share` only its rows of each batch are read: [batch / count, length].
        Batches are read ahead in the background until the iterator is closed.

        Raises `UserError` for a damaged record, and for a share that does not fit.
        """
        yield from read_batches(self.stream(seed), batch, first_step, share)

    def sources(self, batch: int, step: int, share: Share = ALL) -> np.ndarray:
        """The number in `names` of the source of each row of batch `step`: int32 [batch / count]."""
        return np.zeros(rows_of_share(batch, share), np.int32)

    def stream(self, seed: int) -> "grain.MapDataset":
        """The endless, reshuffled records, by number: (tokens, segments), int32 [length]."""
        import grain
        return grain.MapDataset.source(_Records(self)).seed(seed).shuffle().repeat()

    def rows(self, selection: slice | Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """The selected records in that order: (tokens, segments), int32 [rows, length].

        Raises `IndexError` for a row that does not exist and `UserError` for a damaged record.
        """
        every = range(self.records)
        indices = every[selection] if isinstance(selection, slice) else [every[index] for index in selection]
        source = _Records(self)
        rows = np.array([source[index] for index in indices], np.int32).reshape(-1, 2, self.length)
        return rows[:, 0], rows[:, 1]


def read_batches(stream: "grain.MapDataset", batch: int, first_step: int, share: Share) -> Batches:
    """Rows of `stream` as batches `first_step`, `first_step + 1`, ..., or as one share of each, read ahead."""
    import grain
    index, count = share
    # In batches of one share each, those of process i are numbers i, count + i, 2 * count + i, ...
    shares = stream.batch(rows_of_share(batch, share), drop_remainder=True)[first_step * count + index::count]
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    with contextlib.closing(iter(shares.to_iter_dataset(options))) as iterator:
        yield from iterator


def rows_of_share(batch: int, share: Share) -> int:
    """How many rows of a batch a share has. Raises `UserError` where the batch cannot be cut into such shares."""
    index, count = share
    if not 0 <= index < count:
        raise UserError(f"there is no share {index} of {count}; number the processes from 0")
    if batch % count:
        raise UserError(f"a batch of {batch} records cannot be cut into equal shares for {count} processes; choose a "
                        f"train.batch that {count} divides")
    return batch // count


def check_tokenizer(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Raises `UserError` where `dataset` was prepared with a tokenizer that cuts text otherwise than `tokenizer`."""
    if dataset.tokenizer != tokenizer.fingerprint():
        raise UserError(f"{dataset.directory} was prepared with another tokenizer ({dataset.tokenizer}) than this one "
                        f"({tokenizer.fingerprint()}); prepare the text with the model's own tokenizer")


class _Records:
    """The records in the order they were written, as a random-access source: (tokens, segments), int32 [length]."""

    def __init__(self, dataset: Dataset) -> None:
        from grain.sources import ArrayRecordDataSource
        self._dataset = dataset
        self._source = ArrayRecordDataSource([str(dataset.directory / shard.name) for shard in dataset.shards])
        self._ends = list(itertools.accumulate(shard.records for shard in dataset.shards))

    def __len__(self) -> int:
        return self._dataset.records

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return decode_record(self._source[index], self._dataset.length)
        except (RuntimeError, ValueError) as error:
            number = bisect.bisect_right(self._ends, index)
            shard = self._dataset.shards[number]
            raise UserError(f"record {index - self._ends[number] + shard.records} of "
                            f"{self._dataset.directory / shard.name} is damaged ({error}); "
                            "prepare the text anew") from error


def _check(path: Path, records: int) -> None:
    """Raises `UserError` where the file is not there or does not hold that many records."""
    from array_record.python.array_record_module import ArrayRecordReader
    if not path.is_file():
        raise UserError(f"the dataset lacks its file {path}; restore it or prepare the text anew")
    found = ArrayRecordReader(str(path)).num_records()  # 0 for what is no ArrayRecord file; closing that would raise
    if found != records:
        raise UserError(f"{path} holds {found} records instead of {records}; restore it or prepare the text anew")
