"""Checksums of what a checkpoint holds, written into it and compared on every read.

That of an array is a sum of hashes of its words, each mixed with its index. Integer addition is associative, so the sum
does not depend on how the array is laid out over devices and processes.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from dlm_jax.hashing import hash32
from dlm_jax.schema.json_text import parse_json
from dlm_jax.typing import Array

SALTS = (0x243F6A88, 0x85A308D3)  # digits of pi; each gives 32 bits of a checksum
SEAL = "sha256"  # the field of a JSON object that holds the digest of the others


class Damage(Exception):
    """What was read is not what was written; the text says which part."""


def checksums(tree: Any) -> dict[str, str]:
    """The checksum of every array of `tree`, 16 hex digits, by its path (as `jax.tree_util.keystr` writes it).

    A change within one word of 32 bits always changes it; other damage goes unnoticed once in 2^64 times. All processes
    have to call this together.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    halves = jax.device_get([_halves(leaf) for _, leaf in leaves])
    return {jax.tree_util.keystr(path): "".join(f"{int(half):08x}" for half in pair)
            for (path, _), pair in zip(leaves, halves)}


@jax.jit
def _halves(x: Array) -> list[jax.Array]:
    """The two halves of a checksum: uint32 scalars. x: of any shape and of a dtype of at most 32 bits."""
    bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)  # row-major, modulo 2^32
    for axis, size in enumerate(x.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    return [jnp.sum(hash32(bits ^ hash32(index ^ jnp.uint32(salt))), dtype=jnp.uint32) for salt in SALTS]


def check_arrays(tree: Any, expected: dict[str, str]) -> None:
    """Raises `Damage` naming the first array of `tree` that has another checksum than the expected one.

    All processes have to call this together.
    """
    for name, found in checksums(tree).items():
        if found != expected.get(name):
            raise Damage(f"{name} differs from its checksum")


def sealed(fields: dict[str, Any]) -> dict[str, Any]:
    """`fields`, which become a JSON object, with their own digest."""
    return {**fields, SEAL: _digest(fields)}


def unsealed(text: str) -> dict[str, Any]:
    """The fields in the text of a JSON object that was `sealed`. Raises `Damage` if they have another digest."""
    fields = parse_json(text.encode())
    if fields.pop(SEAL, None) != _digest(fields):
        raise Damage("its description differs from its checksum")
    return fields


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
