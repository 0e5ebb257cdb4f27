"""Safetensors files: read strictly, written in shards, with one tensor in memory at a time."""

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
from dlm_jax.schema.json_text import check_regular, parse_json, shown
from dlm_jax.schema.kinds import Schema, check_fields, choice, list_of, whole
from dlm_jax.typing import Float, shape_checked

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)
# The dtype in memory for each stored type. float16 becomes float32, because no accelerator that we train on prefers
# float16, and bfloat16 would round it.
HELD_AS = {"F32": FLOAT32, "BF16": BFLOAT16, "F16": FLOAT32}
MAX_HEADER = 100_000_000  # bytes, as in the format
DTYPES = ("BOOL", "U8", "I8", "F4", "F6_E2M3", "F6_E3M2", "F8_E5M2", "F8_E4M3", "F8_E8M0", "I16", "U16", "F16",
          "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64")  # most are refused later, by the tensor's name
# What a header says of each tensor.
TENSOR: Schema = {"dtype": choice(*DTYPES), "shape": list_of(whole(0, 2**40)),
                  "data_offsets": list_of(whole(0, 2**63 - 1))}
STORED_AS = {FLOAT32: "F32", BFLOAT16: "BF16"}


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file, as described by the file's header."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it, such as "BF16"


@dataclasses.dataclass(frozen=True)
class Outgoing:
    """A tensor to be written."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]  # computes the array, when it is written

    @property
    def nbytes(self) -> int:
        """Size of the array in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def scan(files: Iterable[Path]) -> dict[str, Stored]:
    """The tensors of all `files`, by name, from their headers.

    Raises `UserError` for a missing or corrupt file, and for a tensor that is in two files.
    """
    found: dict[str, Stored] = {}
    for file in files:
        header = read_header(file)
        with opened(file):  # compares the header with the size of the file
            pass
        for name, fields in header.items():
            if name in found:
                raise UserError(f"tensor {name} is in both {found[name].file.name} and {file.name}; keep one")
            found[name] = Stored(file, tuple(fields["shape"]), fields["dtype"])
    return found


def read_header(file: Path) -> dict[str, Any]:
    """The fields of `TENSOR` for each tensor in a file, by name. Raises `UserError` for anything else."""
    try:
        check_regular(file)
        with file.open("rb") as opened_file:
            size = int.from_bytes(opened_file.read(8), "little")
            header = parse_json(opened_file.read(min(size, MAX_HEADER + 1)), MAX_HEADER)
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
    except (OSError, ValueError) as error:
        raise incomplete(file, error) from error
    header.pop("__metadata__", None)
    for name, fields in header.items():
        if not isinstance(fields, dict) or any(fields.get(key) is None for key in TENSOR):
            raise UserError(f"{file} does not state the {', '.join(TENSOR)} of its tensor {shown(name)}; copy or "
                            "download it again")
        check_fields(fields, TENSOR, f"{file}: tensor {shown(name)}")
    return header


def opened(file: Path) -> Any:
    """`safe_open`, with failures reported as `UserError`."""
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise incomplete(file, error) from error


def incomplete(file: Path, error: Exception) -> UserError:
    """What to tell a user whose file cannot be read."""
    return UserError(f"{file} is not a complete safetensors file ({error}); copy or download it again")


def check_names(stored: Iterable[str], expected: Iterable[str], where: Path) -> None:
    """Raises `UserError` naming the tensors that are missing from `where`, or unexpected there."""
    stored, expected = set(stored), set(expected)
    for problem, names in (("lacks the tensors", expected - stored), ("has unexpected tensors", stored - expected)):
        if names:
            raise UserError(f"{where} {problem} {some(names)}; download it again or fix its configuration, which does "
                            "not match its weights")


def check_tensor(name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    """Raises `UserError` if the header has another shape than `shape`, or a type that is not in `HELD_AS`."""
    if stored.shape != shape:
        raise UserError(f"tensor {name} in {stored.file} has the shape {list(stored.shape)}, but the configuration "
                        f"asks for {list(shape)}")
    if stored.dtype not in HELD_AS:
        raise UserError(f"tensor {name} in {stored.file} is of type {stored.dtype}; convert it to float32 or bfloat16")


@shape_checked
def read(name: str, stored: Stored) -> Float[np.ndarray, "..."]:
    """The array of a tensor, in its stored type. Raises `UserError` if it contains NaN or infinite values.

    The file is reopened for each tensor, because a mapped file keeps everything read from it in memory.
    """
    with opened(stored.file) as tensors:
        array = tensors.get_tensor(name)
    if not np.isfinite(array).all():
        raise UserError(f"tensor {name} in {stored.file} holds NaN or infinite values; the checkpoint is damaged, "
                        "so download it again")
    return array


def memory_dtype(stored: Iterable[Stored], requested: str | np.dtype | None) -> np.dtype:
    """The type to hold all tensors in: `requested`, or else the widest stored type (float16 counts as float32)."""
    if requested is None:
        return FLOAT32 if any(HELD_AS[s.dtype] == FLOAT32 for s in stored) else BFLOAT16
    return checked_dtype(requested)


def checked_dtype(requested: str | np.dtype) -> np.dtype:
    """`requested` as a numpy dtype. Raises `UserError` unless parameters can have it."""
    if str(requested) not in map(str, STORED_AS):
        raise UserError(f"parameters are held in float32 or bfloat16, not in {requested}; choose one of the two")
    return np.dtype(requested)


def write_sharded(directory: Path, tensors: Iterable[Outgoing], stem: str, shard_bytes: int) -> dict[str, str]:
    """Writes `{stem}-0000i-of-0000n.safetensors` of at most `shard_bytes` each, unless one tensor alone is larger.

    Returns the file name of each tensor.
    """
    shards: list[list[Outgoing]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > shard_bytes:
            shards.append([])
        shards[-1].append(tensor)
    file_of: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / file, shard)
        file_of |= {tensor.name: file for tensor in shard}
    return file_of


def write_file(path: Path, tensors: list[Outgoing]) -> None:
    """Writes one safetensors file, tensor by tensor (`safetensors.numpy.save_file` would first copy them all)."""
    header: dict[str, Mapping] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        header[tensor.name] = {"dtype": STORED_AS[tensor.dtype], "shape": list(tensor.shape),
                               "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to eight bytes
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            array = np.ascontiguousarray(tensor.make())
            assert (array.shape, array.dtype) == (tensor.shape, tensor.dtype), tensor.name
            out.write(array.reshape(-1).view(np.uint8).data)


def some(names: Iterable[str]) -> str:
    """The first four names in sorted order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
