"""Rotary position embeddings on TPUs, by a kernel that turns the projections where they lie.

Without it XLA brings the halves of each head side by side and back, at ten times the cost of reading and writing them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.tiles import TILE

VMEM = 15 << 20  # bytes, which every chip has


def rotate_tpu(q: jax.Array, k: jax.Array, angles: jax.Array, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """As `rotate_heads`, for head_dim a multiple of TILE."""
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k))
    turned = _rotate(interpret, *flat, *rotation_tables(angles))
    return turned[0].reshape(q.shape), turned[1].reshape(k.shape)


def rotation_tables(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `rotate_tile` multiplies a value and the other one of its plane by, [b or 1, n, d]."""
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([cos, cos], -1), jnp.concatenate([-sin, sin], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rotate(interpret: Any, q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q [b, n, h d], k [b, n, g d], cos and sin [b or 1, n, d]."""
    b, n, _ = q.shape
    tokens = tokens_in_vmem(q.shape[2] + k.shape[2], q.dtype.itemsize)

    def spec(x: jax.Array) -> pl.BlockSpec:
        return pl.BlockSpec((1, tokens, x.shape[2]), lambda b, i: (b if x.shape[0] > 1 else 0, i, 0))

    return pl.pallas_call(
        rotate_kernel, grid=(b, pl.cdiv(n, tokens)), in_specs=[spec(x) for x in (q, k, cos, sin)],
        out_specs=[spec(q), spec(k)], out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=[pltpu.PARALLEL] * 2, vmem_limit_bytes=VMEM),
        interpret=interpret, name="rotate")(q, k, cos, sin)


def tokens_in_vmem(width: int, itemsize: int) -> int:
    """How many tokens, of so many values in q and k, come and go at once: four times, as the next ones are prefetched,
    in all but a fifth of VMEM. At most TILE, and a multiple of 8."""
    return min(TILE, VMEM * 4 // 5 // (4 * width * itemsize) // 8 * 8)


def rotate_kernel(q: Any, k: Any, cos: Any, sin: Any, q_out: Any, k_out: Any) -> None:
    """The rotation of every head, for a tile of tokens."""
    d = cos.shape[2]
    for x, out in ((q, q_out), (k, k_out)):
        for i in range(0, x.shape[2], d):
            out[0, :, i:i + d] = rotate_tile(x[0, :, i:i + d].astype(cos.dtype), cos[0], sin[0]).astype(out.dtype)


def rotate_tile(head: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """x cos + (x with its halves exchanged) sin, of a head [tokens, d]."""
    return head * cos + pltpu.roll(head, head.shape[1] // 2, 1) * sin


def _forward(interpret: Any, q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[Any, tuple]:
    return _rotate(interpret, q, k, cos, sin), (cos, sin)


def _backward(interpret: Any, residuals: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    cos, sin = residuals
    return *_rotate(interpret, *gradients, cos, -sin), None, None  # by the opposite angles


_rotate.defvjp(_forward, _backward)
