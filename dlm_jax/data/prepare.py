"""Text into a packed dataset on disk: ArrayRecord shards and a `dataset.json` that describes them."""

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dlm_jax.data.own_directory import own_directory
from dlm_jax.data.pack import pack
from dlm_jax.data.pool import EncodedGroup, Group, encode_in_processes
from dlm_jax.data.records import DESCRIPTION, FORMAT, encode_record
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

BATCH_DOCUMENTS, BATCH_BYTES = 256, 2**20  # tokenised together: enough for a process, and little to hold in memory
SHARD_BYTES = 2**28  # before compression


def prepare(documents: Iterable[str], tokenizer: Tokenizer, length: int, out: str | Path,
            progress: Callable[[int], None] = lambda done: None, processes: int = 1) -> dict:
    """Writes the documents as records of `length` tokens into the new directory `out`, and returns its description.

    Each document stands between the tokenizer's start and end tokens, where it has them. Memory does not grow with the
    text. `progress` is called with the UTF-8 bytes of text done so far. More than one of `processes` are started anew
    and cut the text while this one reads and writes; the files are the same, byte for byte. What goes wrong leaves
    nothing at `out`, and what a killed run has left beside it is removed.

    Raises `UserError` for a `length` below 2, no text at all, an `out` that is in use, and a full disk.
    """
    check_length(length)
    with own_directory(out) as directory:
        part = write_part(documents, tokenizer, length, directory, "records", progress, processes)
        return describe([part], tokenizer, length, directory)


def check_length(length: int) -> None:
    """Raises `UserError` for records that are too short."""
    if length < 2:
        raise UserError(f"a record of {length} tokens teaches nothing; choose a length of at least 2")


def write_part(documents: Iterable[str], tokenizer: Tokenizer, length: int, directory: Path, name: str,
               progress: Callable[[int], None] = lambda done: None, processes: int = 1) -> dict:
    """Writes the documents into shards of `directory` whose names begin with `name`; returns what they hold. The last
    record is padded."""
    counts = {"documents": 0, "bytes": 0}
    with contextlib.closing(_encoded(documents, tokenizer, processes)) as groups:
        records = pack(_counted(groups, counts, progress), length, tokenizer.bos_id, tokenizer.eos_id)
        written = write_records(records, length, directory, name)
    return {**counts, **written}


def describe(parts: Sequence[dict], tokenizer: Tokenizer, length: int, directory: Path) -> dict:
    """Writes and returns the description of the dataset that `parts` make. Raises `UserError` where they are empty."""
    sums = {key: sum(part[key] for part in parts) for key in ("documents", "bytes", "records", "tokens")}
    if not sums["records"]:
        raise UserError("the documents hold no text; name some that do")
    description = {"format": FORMAT, "length": length, **sums, "shards": [s for part in parts for s in part["shards"]],
                   "tokenizer": tokenizer.fingerprint(), "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def _encoded(documents: Iterable[str], tokenizer: Tokenizer, processes: int) -> Generator[EncodedGroup, None, None]:
    """The ids of the documents, group by group, with the size of each group's text in bytes."""
    if processes > 1:
        yield from encode_in_processes(_groups(documents), tokenizer.backend, processes)
    else:
        for texts, size in _groups(documents):
            yield [np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts)], size


def _counted(groups: Iterable[EncodedGroup], counts: dict[str, int],
             progress: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The ids of each document, int32 [tokens]; what they were made from is added to `counts`."""
    for documents, size in groups:
        yield from documents
        counts["documents"] += len(documents)
        counts["bytes"] += size
        progress(counts["bytes"])


def _groups(documents: Iterable[str]) -> Iterator[Group]:
    """Consecutive documents with their size in bytes."""
    texts: list[str] = []
    size = 0
    for text in documents:
        texts.append(text)
        size += len(text.encode())
        if len(texts) == BATCH_DOCUMENTS or size >= BATCH_BYTES:
            yield texts, size
            texts, size = [], 0
    if texts:
        yield texts, size


def write_records(records: Iterator[tuple[np.ndarray, np.ndarray]], length: int, directory: Path, prefix: str) -> dict:
    """Writes the shards into `directory`; returns how many records and real tokens they hold."""
    per_shard = max(1, SHARD_BYTES // (8 * length))
    shards: list[dict] = []
    tokens = 0
    for first in records:
        name = f"{prefix}-{len(shards):05d}.array_record"
        shard = itertools.chain([first], itertools.islice(records, per_shard - 1))
        count, real = _write_shard(directory / name, shard)
        shards.append({"name": name, "records": count})
        tokens += real
    return {"records": sum(shard["records"] for shard in shards), "tokens": tokens, "shards": shards}


def _write_shard(path: Path, records: Iterable[tuple[np.ndarray, np.ndarray]]) -> tuple[int, int]:
    """Writes one ArrayRecord file; returns its records and its real tokens."""
    from array_record.python.array_record_module import ArrayRecordWriter
    writer = ArrayRecordWriter(str(path), "group_size:1")  # one record a chunk: random access reads nothing else
    count = real = 0
    for tokens, segments in records:
        _on_disk(writer.write, encode_record(tokens, segments))
        count += 1
        real += int(np.count_nonzero(segments))
    _on_disk(writer.close)
    return count, real


def _on_disk(action: Callable[..., None], *arguments: bytes) -> None:
    """ArrayRecord reports a full disk as a `RuntimeError`; here it is the `OSError` that it is everywhere else."""
    try:
        action(*arguments)
    except RuntimeError as error:
        raise OSError(str(error)) from error
