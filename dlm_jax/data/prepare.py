"""Packs text into a dataset on disk: ArrayRecord shards, and a `dataset.json` that describes them."""

import contextlib
import itertools
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dlm_jax.data.pack import pack
from dlm_jax.data.pool import EncodedGroup, Group, encode_in_processes
from dlm_jax.data.records import DESCRIPTION, FORMAT, Record, encode_record
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import new_directory
from dlm_jax.schema.ranges import MAX_LENGTH

BATCH_DOCUMENTS, BATCH_BYTES = 256, 2**20  # tokenized together: enough work for a process, little memory
SHARD_BYTES = 2**28  # before compression


def prepare(documents: Iterable[str], tokenizer: Tokenizer, length: int, out: str | Path,
            progress: Callable[[int], None] = lambda done: None, processes: int = 1) -> dict:
    """Writes the documents as records of `length` tokens into the new directory `out`, and returns its description.

    Each document is wrapped in the tokenizer's start and end tokens, if it has them. Memory does not grow with the
    text. `progress` is called with the UTF-8 bytes of text done so far. With `processes` > 1 that many processes
    tokenize while this one reads and writes; the files are the same, byte for byte. A failure leaves nothing at `out`,
    and what a killed run left beside it is deleted.

    Raises `UserError` for a `length` below 2, no text at all, an `out` that already holds something, and a full disk.
    """
    check_length(length)
    with new_directory(out) as directory:
        part = write_part(documents, tokenizer, length, directory, "records", progress, processes)
        return write_description([part], tokenizer, length, directory)


def check_length(length: int) -> None:
    """Raises `UserError` if records would be too short to learn from, or too long to hold."""
    if length < 2:
        raise UserError(f"a record of {length} tokens is too short to learn from; choose a length of at least 2")
    if length > MAX_LENGTH:
        raise UserError(f"a record of {length} tokens is longer than any context; choose at most {MAX_LENGTH}")


def write_part(documents: Iterable[str], tokenizer: Tokenizer, length: int, directory: Path, name: str,
               progress: Callable[[int], None] = lambda done: None, processes: int = 1) -> dict:
    """Writes the documents into shards in `directory` whose names start with `name`, and returns their counts.

    The last record is padded.
    """
    counts = {"documents": 0, "bytes": 0}
    with contextlib.closing(_encoded(documents, tokenizer, processes)) as groups:
        records = pack(_counted(groups, counts, progress), length, tokenizer.bos_id, tokenizer.eos_id)
        written = write_records(records, length, directory, name)
    return {**counts, **written}


def write_description(parts: Sequence[dict], tokenizer: Tokenizer, length: int, directory: Path) -> dict:
    """Writes and returns the description of the dataset made of `parts`. Raises `UserError` if they are all empty."""
    sums = {key: sum(part[key] for part in parts) for key in ("documents", "bytes", "records", "tokens")}
    if not sums["records"]:
        raise UserError("the documents hold no text; name files that do")
    shards = [shard for part in parts for shard in part["shards"]]
    description = {"format": FORMAT, "length": length, **sums, "shards": shards,
                   "tokenizer": tokenizer.fingerprint(), "bos_id": tokenizer.bos_id, "eos_id": tokenizer.eos_id}
    (directory / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    return description


def _encoded(documents: Iterable[str], tokenizer: Tokenizer, processes: int) -> Generator[EncodedGroup, None, None]:
    """The ids of each group of documents, int32 [tokens] per document, and the group's size in bytes."""
    if processes > 1:
        yield from encode_in_processes(_groups(documents), tokenizer.backend, processes)
    else:
        for texts, size in _groups(documents):
            yield [np.array(ids, np.int32) for ids in tokenizer.encode_batch(texts)], size


def _counted(groups: Iterable[EncodedGroup], counts: dict[str, int],
             progress: Callable[[int], None]) -> Iterator[np.ndarray]:
    """The ids of each document, int32 [tokens], while adding up documents and bytes in `counts`."""
    for documents, size in groups:
        yield from documents
        counts["documents"] += len(documents)
        counts["bytes"] += size
        progress(counts["bytes"])


def _groups(documents: Iterable[str]) -> Iterator[Group]:
    """Groups of consecutive documents, each with its size in bytes."""
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


def write_records(records: Iterator[Record], length: int, directory: Path, prefix: str) -> dict:
    """Writes the shards into `directory`, and returns how many records and non-padding tokens they hold."""
    per_shard = max(1, SHARD_BYTES // (8 * length))
    shards: list[dict] = []
    tokens = 0
    for first in records:
        name = f"{prefix}-{len(shards):05d}.array_record"
        shard = itertools.chain([first], itertools.islice(records, per_shard - 1))
        count, shard_tokens = _write_shard(directory / name, shard)
        shards.append({"name": name, "records": count})
        tokens += shard_tokens
    return {"records": sum(shard["records"] for shard in shards), "tokens": tokens, "shards": shards}


def _write_shard(path: Path, records: Iterable[Record]) -> tuple[int, int]:
    """Writes one ArrayRecord file, and returns its number of records and of non-padding tokens."""
    from array_record.python.array_record_module import ArrayRecordWriter
    writer = ArrayRecordWriter(str(path), "group_size:1")  # one record per chunk, so random access reads nothing else
    count = real_tokens = 0
    for tokens, segments in records:
        _on_disk(writer.write, encode_record(tokens, segments))
        count += 1
        real_tokens += int(np.count_nonzero(segments))
    _on_disk(writer.close)
    return count, real_tokens


def _on_disk(action: Callable[..., None], *arguments: bytes) -> None:
    """Runs `action`. ArrayRecord reports a full disk as a `RuntimeError`; this raises the usual `OSError` instead."""
    try:
        action(*arguments)
    except RuntimeError as error:
        raise OSError(str(error)) from error
