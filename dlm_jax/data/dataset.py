"""A prepared dataset: any batch of an endless reshuffled stream, or any rows in the order they were written."""

import bisect
import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Sequence
from dataclasses import field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dlm_jax.data.records import DESCRIPTION, FORMAT, Record, decode_record
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.ranges import MAX_LENGTH, between, positive
from dlm_jax.schema.record import from_json
from dlm_jax.typing import Int32, shape_checked

if TYPE_CHECKING:
    import grain

READ_THREADS, READ_AHEAD = 2, 4  # batches read concurrently, and batches kept ready

# (index, count): each batch is split into `count` equal runs of rows, and process `index` reads run number `index`.
ProcessShard = tuple[int, int]
FULL_BATCH: ProcessShard = (0, 1)  # all rows, in one process

Rows = tuple[Int32[np.ndarray, "b n"], Int32[np.ndarray, "b n"]]  # tokens and segments
Batches = Generator[Rows, None, None]


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of a dataset."""

    name: str
    records: int = positive()  # how many it must hold


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What `prepare` wrote: packed records of one length, and the counts in their description."""

    directory: Path
    length: int = field(metadata=between(2, MAX_LENGTH))  # tokens per record
    records: int = field(metadata=between(1, 2**53))
    tokens: int = field(metadata=between(0, 2**53))  # excluding padding
    documents: int = field(metadata=between(0, 2**53))
    bytes: int = field(metadata=between(0, 2**63))  # of the source text, in UTF-8
    tokenizer: str  # the fingerprint of the tokenizer that the text was prepared with
    bos_id: int | None
    eos_id: int | None
    shards: tuple[Shard, ...]

    @classmethod
    def open(cls, directory: str | Path) -> "Dataset":
        """Opens what `prepare` wrote.

        Raises `UserError` if it is missing, incomplete, or in a format this version does not know.
        """
        directory = Path(directory)
        try:
            fields = read_json(directory / DESCRIPTION)
            if fields.pop("format", None) != FORMAT:
                raise UserError(f"{DESCRIPTION} is of a format that this version of dlm-jax does not know")
            dataset = from_json(cls, fields, DESCRIPTION, directory=directory)
        except UserError as error:
            raise UserError(f"{directory} is not a prepared dataset ({error}); prepare the text into it") from error
        if sum(shard.records for shard in dataset.shards) != dataset.records:
            raise UserError(f"the shards in {directory / DESCRIPTION} do not add up to {dataset.records} records; "
                            "prepare the text again")
        for shard in dataset.shards:
            _check_shard(directory, shard)
        return dataset

    @property
    def names(self) -> tuple[str, ...]:
        """The sources the rows come from: one for a dataset, several for a `Mixture`."""
        return (self.directory.name,)

    def batches(self, batch: int, seed: int, first_step: int = 0, shard: ProcessShard = FULL_BATCH) -> Batches:
        """Batches `first_step`, `first_step + 1`, ... without end: (tokens, segments), int32 [batch, length].

        Batch n depends on `seed` and n alone. Each epoch visits every record once, in a new order; a batch may span two
        epochs. With a `shard`, only its rows of each batch are read: [batch / count, length]. Batches are read ahead in
        the background until the iterator is closed.

        Raises `UserError` for a damaged record, and for a shard that does not fit the batch.
        """
        yield from read_batches(self.stream(seed), batch, first_step, shard)

    @shape_checked
    def sources(self, batch: int, step: int, shard: ProcessShard = FULL_BATCH) -> Int32[np.ndarray, " rows"]:
        """The source of each row of batch `step`, as an index into `names`: int32 [batch / count], all 0."""
        return np.zeros(rows_per_shard(batch, shard), np.int32)

    def stream(self, seed: int) -> "grain.MapDataset":
        """The endless, reshuffled records, by index: (tokens, segments), int32 [length]."""
        import grain
        return grain.MapDataset.source(_Records(self)).seed(seed).shuffle().repeat()

    @shape_checked
    def rows(self, selection: slice | Sequence[int]) -> Rows:
        """The selected records, in that order: (tokens, segments), int32 [rows, length].

        Raises `IndexError` for a row that does not exist and `UserError` for a damaged record.
        """
        every = range(self.records)
        indices = every[selection] if isinstance(selection, slice) else [every[index] for index in selection]
        source = _Records(self)
        rows = np.array([source[index] for index in indices], np.int32).reshape(-1, 2, self.length)
        return rows[:, 0], rows[:, 1]


def read_batches(stream: "grain.MapDataset", batch: int, first_step: int, shard: ProcessShard) -> Batches:
    """Rows of `stream` as batches `first_step`, `first_step + 1`, ..., or one shard of each batch, read ahead."""
    import grain
    index, count = shard
    # The stream cut into pieces of one shard each: process i reads pieces i, count + i, 2 * count + i, ...
    shards = stream.batch(rows_per_shard(batch, shard), drop_remainder=True)[first_step * count + index::count]
    options = grain.ReadOptions(num_threads=READ_THREADS, prefetch_buffer_size=READ_AHEAD)
    with contextlib.closing(iter(shards.to_iter_dataset(options))) as iterator:
        yield from iterator


def rows_per_shard(batch: int, shard: ProcessShard) -> int:
    """Rows of a batch in one shard. Raises `UserError` if the batch cannot be split that way."""
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"there is no shard {index} of {count}; number the processes from 0")
    if batch % count:
        raise UserError(f"a batch of {batch} records cannot be split evenly over {count} processes; choose a "
                        f"train.global_batch_size that {count} divides")
    return batch // count


def check_tokenizer(dataset: Dataset, tokenizer: Tokenizer) -> None:
    """Raises `UserError` if `dataset` was prepared with a tokenizer that splits text differently from `tokenizer`."""
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

    def __getitem__(self, index: int) -> Record:
        try:
            return decode_record(self._source[index], self._dataset.length)
        except (RuntimeError, ValueError) as error:
            number = bisect.bisect_right(self._ends, index)
            shard = self._dataset.shards[number]
            raise UserError(f"record {index - self._ends[number] + shard.records} of "
                            f"{self._dataset.directory / shard.name} is damaged ({error}); "
                            "prepare the text again") from error


def _check_shard(directory: Path, shard: Shard) -> None:
    """Raises `UserError` if the file is missing, elsewhere, or does not hold that many records."""
    path, records = directory / shard.name, shard.records
    if Path(shard.name).name != shard.name:
        raise UserError(f"{directory / DESCRIPTION} names the file {shown(shard.name)}, which is not in its directory; "
                        "prepare the text again")
    from array_record.python.array_record_module import ArrayRecordReader
    if not path.is_file():
        raise UserError(f"the dataset lacks its file {path}; restore it or prepare the text again")
    found = ArrayRecordReader(str(path)).num_records()  # 0 if it is not an ArrayRecord file, and closing would raise
    if found != records:
        raise UserError(f"{path} holds {found} records instead of {records}; restore it or prepare the text again")
