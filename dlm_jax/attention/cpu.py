"""Dense attention for CPUs: the reference's mathematics in the shapes that a CPU multiplies fast.

One sequence at a time, so that its scores stay in cache; the backward pass makes the probabilities again from q and k,
so that nothing of size Q x K is kept between the passes (as FlashAttention does, arXiv 2205.14135, by whole sequences).

Letters: g key-value heads, m = (query heads of one key-value head) x (queries), n keys, d head_dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

NEVER = -1e30


def attend_cpu(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """As `attend_dense`: q [b, Q, heads, d], k and v [b, K, kv_heads, d], mask bool [b or 1, Q, K]."""
    b, queries, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, queries, g, h // g, d).transpose(0, 2, 3, 1, 4).reshape(b, g, -1, d) * d**-0.5
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    out = _attend(q, k, v, jnp.tile(mask, (1, h // g, 1)))
    return out.reshape(b, g, h // g, queries, d).transpose(0, 3, 1, 2, 4).reshape(b, queries, h, d)


def probabilities(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax over the visible keys in fp32, [g, m, n] from q [g, m, d], k [g, n, d], mask [m, n]; 0 where none is."""
    scores = jnp.einsum("gmd,gnd->gmn", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = jnp.where(mask, scores, NEVER)
    weights = jnp.where(mask, jnp.exp(scores - jnp.max(scores, -1, keepdims=True)), 0.0)
    return weights / jnp.maximum(jnp.sum(weights, -1, keepdims=True), 1e-30)


def by_sequence(function: Callable, *arrays: jax.Array, mask: jax.Array) -> Any:
    """`function(*arrays of one sequence, its mask)` for each sequence of the batch; a mask of batch 1 serves all."""
    if mask.shape[0] == 1:
        return jax.lax.map(lambda x: function(*x, mask[0]), arrays)
    return jax.lax.map(lambda x: function(*x), (*arrays, mask))


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    def one(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
        return jnp.einsum("gmn,gnd->gmd", probabilities(q, k, mask).astype(v.dtype), v)

    return by_sequence(one, q, k, v, mask=mask)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> tuple[jax.Array, tuple]:
    out = _attend(q, k, v, mask)
    return out, (q, k, v, mask, out)


def _backward(residuals: tuple, d_out: jax.Array) -> tuple:
    q, k, v, mask, out = residuals

    def one(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, d_out: jax.Array,
            mask: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        p = probabilities(q, k, mask)
        wide = p.dtype
        dp = jnp.einsum("gmd,gnd->gmn", d_out, v, preferred_element_type=wide)
        ds = (p * (dp - jnp.sum(d_out.astype(wide) * out, -1, keepdims=True))).astype(q.dtype)
        dq = jnp.einsum("gmn,gnd->gmd", ds, k)
        # The sums over queries come out transposed, and are turned outside the loop: asked for in [n, d], XLA's CPU
        # compiler turns the large operand instead (8 times slower).
        dk = jnp.einsum("gdm,gmn->gdn", jnp.swapaxes(q, 1, 2), ds)
        dv = jnp.einsum("gdm,gmn->gdn", jnp.swapaxes(d_out, 1, 2), p.astype(d_out.dtype))
        return dq, dk, dv

    dq, dk, dv = by_sequence(one, q, k, v, out, d_out, mask=mask)
    return dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), None


_attend.defvjp(_forward, _backward)
