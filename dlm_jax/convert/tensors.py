"""Safetensors files, read strictly and written in shards, one tensor in memory at a time."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from dlm_jax.errors import UserError

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
# What a stored type becomes in memory: no accelerator that we train on prefers float16, and bfloat16 would round it.
KEPT_AS = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT32}
STORED_AS = {FLOAT32: "F32", BFLOAT16: "BF16"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, known by its header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to be written; `make` gives its array when its turn comes."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def scan(files: Iterable[Path]) -> dict[str, Stored]:
    """The headers of all `files`. Raises `UserError` for a missing or corrupt file and a tensor that two files hold."""
    found: dict[str, Stored] = {}
    for file in files:
        with opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118, it is no dictionary
                if name in found:
                    raise UserError(f"tensor {name} is in both {found[name].file.name} and {file.name}; keep one")
                header = tensors.get_slice(name)
                found[name] = Stored(file, tuple(header.get_shape()), header.get_dtype())
    return found


def opened(file: Path) -> Any:
    """`safe_open` whose failures are sentences."""
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({error}); copy or download it again") from error


def check_names(stored: Iterable[str], expected: Iterable[str], where: Path) -> None:
    """Raises `UserError` that names the tensors that are missing from `where`, or in it without a reason."""
    stored, expected = set(stored), set(expected)
    for verb, names in (("lacks", expected - stored), ("has unexpected", stored - expected)):
        if names:
            raise UserError(f"{where} {verb} the tensors {some(names)}; its weights do not fit its configuration")


def check_tensor(name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    """Raises `UserError` where the header has another shape than `shape`, or a type that is not in `KEPT_AS`."""
    if stored.shape != shape:
        raise UserError(f"tensor {name} in {stored.file} has the shape {list(stored.shape)}, but the configuration "
                        f"asks for {list(shape)}")
    if stored.dtype not in KEPT_AS:
        raise UserError(f"tensor {name} in {stored.file} is of type {stored.dtype}; convert it to float32 or bfloat16")


def read(name: str, stored: Stored) -> np.ndarray:
    """The array of a tensor, in its stored type. Raises `UserError` where a number is not finite.

    The file is opened anew for each tensor, because a mapped file would keep all that was read of it in memory.
    """
    with opened(stored.file) as tensors:
        array = tensors.get_tensor(name)
    if not np.isfinite(array).all():
        raise UserError(f"tensor {name} in {stored.file} holds NaN or infinite numbers; the checkpoint is damaged")
    return array


def memory_dtype(stored: Iterable[Stored], asked: str | np.dtype | None) -> np.dtype:
    """The type to hold all tensors in: `asked`, or else the widest of what is stored (float16 counts as float32)."""
    if asked is None:
        return FLOAT32 if any(KEPT_AS[s.dtype] == FLOAT32 for s in stored) else BFLOAT16
    return checked_dtype(asked)


def checked_dtype(asked: str | np.dtype) -> np.dtype:
    """A type that parameters can have. Raises `UserError` for another."""
    if np.dtype(asked) not in STORED_AS:
        raise UserError(f"parameters are held in float32 or bfloat16, not in {np.dtype(asked)}")
    return np.dtype(asked)


def write_sharded(directory: Path, tensors: Iterable[Outgoing], stem: str, shard_bytes: int) -> dict[str, str]:
    """Writes `{stem}-0000i-of-0000n.safetensors` of at most `shard_bytes` each, unless one tensor alone is larger.

    Returns the file of each tensor.
    """
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    placed: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard)
        placed |= {tensor.name: file for tensor in shard}
    return placed


def write_file(path: Path, tensors: list[Outgoing]) -> None:
    """One safetensors file, tensor by tensor (`safetensors.numpy.save_file` would first copy them all)."""
    header: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": STORED_AS[tensor.dtype], "shape": list(tensor.shape),
                               "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format asks that the data begin on a multiple of eight bytes
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make())
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), tensor.name
            out.write(array.reshape(-1).view(np.uint8).data)


def some(names: Iterable[str]) -> str:
    """Up to four names in order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
