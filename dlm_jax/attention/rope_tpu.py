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
SUBLANES = 8  # rows of a register: so many partial sums of the scales' gradients leave each tile


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
    return tuple(call_by_tiles(rotate_kernel, "rotate", interpret, (q, k), (cos, sin)))


def call_by_tiles(kernel: Any, name: str, interpret: Any, heads: tuple[jax.Array, ...], shared: tuple[jax.Array, ...],
                  scales: int = 0) -> Any:
    """Calls the kernel for each tile of tokens. It writes the first two of `heads` anew, and so many gradients of
    scales, fp32 [b, tiles, SUBLANES, d]."""
    (b, n, _), d = heads[0].shape, shared[0].shape[2]
    tokens = tokens_in_vmem(sum(x.shape[2] for x in (*heads, *heads[:2])) // 2, heads[0].dtype.itemsize)
    tiles = pl.cdiv(n, tokens)

    def spec(x: jax.Array) -> pl.BlockSpec:
        if x.ndim == 2:  # scales
            return pl.BlockSpec(x.shape, lambda b, i: (0, 0))
        return pl.BlockSpec((1, tokens, x.shape[2]), lambda b, i: (b if x.shape[0] > 1 else 0, i, 0))

    sums = [jax.ShapeDtypeStruct((b, tiles, SUBLANES, d), jnp.float32)] * scales
    return pl.pallas_call(
        kernel, grid=(b, tiles), in_specs=[spec(x) for x in (*heads, *shared)],
        out_specs=[*map(spec, heads[:2]), *[pl.BlockSpec((1, 1, SUBLANES, d), lambda b, i: (b, i, 0, 0))] * scales],
        out_shape=[*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in heads[:2]), *sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=[pltpu.PARALLEL] * 2, vmem_limit_bytes=VMEM),
        interpret=interpret, name=name)(*heads, *shared)


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
