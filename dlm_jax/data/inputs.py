"""Where text comes from: local files and object stores, plain or compressed, by name or by pattern."""

import contextlib
import glob
import gzip
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dlm_jax.errors import UserError
from dlm_jax.files import is_remote, reachable

TFDS = "tfds:"
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"  # how such files begin
# What is read of a compressed file may swell to so many bytes in any case, and so many times its own size.
FREE, MAX_RATIO = 2**22, 200


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
        magic = stored.read(4)
        stored.seek(0)
        if name.lower().endswith(".gz"):
            with gzip.open(stored) as file:
                yield io.BufferedReader(_Inflated(file, name, stored))
        elif name.lower().endswith(".zst"):
            import pyarrow  # unlike the zstandard package, it reports a truncated file
            stream: Any = pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, "r"), "zstd")
            yield io.BufferedReader(_Inflated(stream, name, stored))
        elif magic.startswith(GZIP) or magic == ZSTD:
            raise UserError(f"{name} is compressed and its name does not say so; add "
                            f"{'.gz' if magic.startswith(GZIP) else '.zst'} to it")
        else:
            yield stored


class _Inflated(io.RawIOBase):
    """What a compressed stream holds. Reading raises `UserError` for a bomb: a small file that swells without end."""

    def __init__(self, stream: Any, name: str, stored: BinaryIO) -> None:
        self._stream, self._name, self._stored, self._size = stream, name, stored, 0

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        data = self._stream.read(len(buffer))
        self._size += len(data)
        if self._size > max(FREE, MAX_RATIO * self._stored.tell()):
            raise UserError(f"{self._name} swells to more than {MAX_RATIO} times its size, as no text does; check "
                            "where it comes from")
        buffer[:len(data)] = data
        return len(data)


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
