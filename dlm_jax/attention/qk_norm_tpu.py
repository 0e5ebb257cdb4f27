"""The norm of queries and keys and their rotation on TPUs, by one kernel that reads the projections where they lie.

XLA takes the norm of a head in passes of its own, which read and write everything several times and copy it in between.

Letters: x a head as projected, y = x r its norm without the scale, where r = 1 / rms(x).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from dlm_jax.attention.rope_tpu import SUBLANES, call_by_tiles, rotate_tile, rotation_tables


def norm_and_rotate_tpu(q: jax.Array, k: jax.Array, angles: jax.Array, q_scale: jax.Array, k_scale: jax.Array,
                        eps: float, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """As `norm_and_rotate_heads`, for head_dim a multiple of TILE."""
    flat = (x.reshape(*x.shape[:2], -1) for x in (q, k))
    scales = (scale.astype(jnp.float32)[None] for scale in (q_scale, k_scale))
    turned = _norm_and_rotate(interpret, eps, *flat, *rotation_tables(angles), *scales)
    return turned[0].reshape(q.shape), turned[1].reshape(k.shape)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm_and_rotate(interpret: Any, eps: float, q: jax.Array, k: jax.Array, cos: jax.Array, sin: jax.Array,
                     q_scale: jax.Array, k_scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q [b, n, h d], k [b, n, g d], cos and sin [b or 1, n, d], scales [1, d]."""
    return call_by_tiles(functools.partial(forward_kernel, eps=eps), "norm_and_rotate", interpret, (q, k),
                         (cos, sin, q_scale, k_scale))


def normalize(x: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """(y, r) of a head [tokens, d], fp32; r in every column."""
    wide = x.astype(jnp.float32)
    r = jax.lax.rsqrt(mean_of_rows(wide * wide, x.dtype) + eps)
    return wide * r, r


def mean_of_rows(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """The mean of each row of x, fp32, in every column, by the matrix unit: a sum across the lanes of registers takes
    longer. It multiplies in bfloat16, so values that come from fp32 (`dtype`) are taken in two parts."""
    ones = jnp.ones((x.shape[1], x.shape[1]), jnp.bfloat16)
    total, parts = jnp.zeros((), jnp.float32), 2 if dtype == jnp.float32 else 1
    for _ in range(parts):
        part = x.astype(jnp.bfloat16)
        total += jnp.dot(part, ones, preferred_element_type=jnp.float32)
        x = x - part.astype(jnp.float32)
    return total / ones.shape[0]


def forward_kernel(q: Any, k: Any, cos: Any, sin: Any, q_scale: Any, k_scale: Any, q_out: Any, k_out: Any, *,
                   eps: float) -> None:
    """The rotation of y times the scale, for a tile of tokens."""
    d = cos.shape[2]
    for x, scale, out in ((q, q_scale, q_out), (k, k_scale, k_out)):
        for i in range(0, x.shape[2], d):
            y, _ = normalize(x[0, :, i:i + d], eps)
            out[0, :, i:i + d] = rotate_tile(y * scale[...], cos[0], sin[0]).astype(out.dtype)


def backward_kernel(q: Any, k: Any, q_out: Any, k_out: Any, cos: Any, sin: Any, q_scale: Any, k_scale: Any, dq: Any,
                    dk: Any, dq_scale: Any, dk_scale: Any, *, eps: float, n: int) -> None:
    """From the gradients of what the forward kernel wrote: those of x, and of the scales summed over heads and tokens.

    With g the gradient of y, that of x is r (g - y mean(g y)).
    """
    tokens, d = q.shape[1], cos.shape[2]
    rows = pl.program_id(1) * tokens + jax.lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)
    inside = rows < n  # the last tile may reach beyond the text, where there is no telling what it reads
    for x, gradient, scale, dx, dscale in ((q, q_out, q_scale, dq, dq_scale), (k, k_out, k_scale, dk, dk_scale)):
        total = jnp.zeros((SUBLANES, d), jnp.float32)
        for i in range(0, x.shape[2], d):
            y, r = normalize(x[0, :, i:i + d], eps)
            g = rotate_tile(gradient[0, :, i:i + d].astype(jnp.float32), cos[0], -sin[0])
            total += jnp.sum(jnp.where(inside, g * y, 0.0).reshape(-1, SUBLANES, d), 0)
            g = g * scale[...]
            dx[0, :, i:i + d] = (r * (g - y * mean_of_rows(g * y, dx.dtype))).astype(dx.dtype)
        dscale[0, 0] = total


def _forward(interpret: Any, eps: float, *operands: jax.Array) -> tuple[Any, tuple]:
    return _norm_and_rotate(interpret, eps, *operands), operands


def _backward(interpret: Any, eps: float, operands: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    q, k, *shared = operands
    kernel = functools.partial(backward_kernel, eps=eps, n=q.shape[1])
    dq, dk, *sums = call_by_tiles(kernel, "norm_and_rotate_backward", interpret, (q, k, *gradients), tuple(shared),
                                  scales=2)
    return dq, dk, None, None, *(jnp.sum(x, (0, 1, 2))[None] for x in sums)


_norm_and_rotate.defvjp(_forward, _backward)
