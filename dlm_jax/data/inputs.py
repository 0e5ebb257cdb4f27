"""Where text comes from: local files and object stores, plain or compressed, by name or by pattern."""

import contextlib
import glob
import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

from dlm_jax.errors import UserError
from dlm_jax.files import is_remote, reachable

TFDS = "tfds:"


def expand(names: Sequence[str | Path]) -> list[str]:
    """The inputs that `names` refer to, in order; a pattern such as 'part-*.jsonl' expands to its files, sorted.

    A name is a local path, a URL that fsspec reads, such as gs://bucket/part.jsonl, or tfds:NAME[:SPLIT].
    Raises `UserError` for a missing file, a pattern that matches nothing, and an unreachable store.
    """
    inputs: list[str] = []
    for name in map(str, names):
        inputs += [name] if name.startswith(TFDS) else _files(name)
    return inputs


def _files(name: str) -> list[str]:
    if is_remote(name):
        found = _remote_files(name)
    else:
        found = [name] if Path(name).exists() else sorted(glob.glob(name, recursive=True))
        found = [file for file in found if Path(file).is_file()]
    if not found:
        raise UserError(f"there is no file {name}; name files of text, JSON lines or Parquet")
    return found


def _remote_files(name: str) -> list[str]:
    with reachable(name):
        from fsspec.core import url_to_fs
        store, path = url_to_fs(name)
        return [store.unstrip_protocol(file) for file in sorted(store.glob(path)) if store.isfile(file)]


@contextlib.contextmanager
def open_bytes(name: str) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed if its name ends in .gz or .zst.

    Reading from it may raise `OSError`, `EOFError` or `zlib.error`.
    """
    with open_stored(name) as stored:
        if name.lower().endswith(".gz"):
            with gzip.open(stored) as file:
                yield cast(BinaryIO, file)
        elif name.lower().endswith(".zst"):
            import pyarrow  # unlike the zstandard package, it reports a truncated file
            stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, "r"), "zstd")
            yield io.BufferedReader(stream)
        else:
            yield stored


@contextlib.contextmanager
def open_stored(name: str) -> Iterator[BinaryIO]:
    """The bytes of a file exactly as stored. The file is seekable."""
    with contextlib.ExitStack() as stack:
        if is_remote(name):
            with reachable(name):
                import fsspec
                file = stack.enter_context(fsspec.open(name, "rb"))
        else:
            file = stack.enter_context(open(name, "rb"))
        yield file
