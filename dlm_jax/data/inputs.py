"""Where text comes from: local files and object stores, plain or compressed, by name or by pattern."""

import bz2
import contextlib
import glob
import gzip
import io
import lzma
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from dlm_jax.errors import UserError
from dlm_jax.files import is_remote, reachable

TFDS = "tfds:"
# What is read of a compressed file may swell to so many bytes in any case, and so many times its own size.
FREE, MAX_RATIO = 2**22, 200


def _open_zstd(stored: BinaryIO) -> Any:
    import pyarrow  # unlike the zstandard package, it reports a truncated file
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stored, "r"), "zstd")


# How the name of a compressed file ends: (how the file begins, opens what it holds).
COMPRESSED: dict[str, tuple[re.Pattern[bytes], Callable[[BinaryIO], Any]]] = {
    ".gz": (re.compile(rb"\x1f\x8b"), gzip.open),
    ".bz2": (re.compile(rb"BZh[1-9]\x31\x41\x59\x26\x53\x59"), bz2.open),
    ".xz": (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
    ".zst": (re.compile(rb"\x28\xb5\x2f\xfd"), _open_zstd),
}


def without_compression(name: str) -> str:
    """The name in lower case, without the ending that says how the file is compressed."""
    name = name.lower()
    return next((name.removesuffix(ending) for ending in COMPRESSED if name.endswith(ending)), name)


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
    """The bytes of a file, decompressed if its name ends as one in `COMPRESSED`.

    Reading from it may raise `OSError`, `EOFError`, `zlib.error` or `lzma.LZMAError`.
    """
    with open_stored(name) as stored:
        magic = stored.read(10)
        stored.seek(0)
        for ending, (begins, opened) in COMPRESSED.items():
            if name.lower().endswith(ending):
                with opened(stored) as stream:
                    yield io.BufferedReader(_Inflated(stream, name, stored))
                return
            if begins.match(magic):
                raise UserError(f"{name} is compressed and its name does not say so; add {ending} to it")
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
