"""Attention for CPUs: the reference's mathematics in the shapes that a CPU multiplies fast.

A few sequences at a time, so that their scores stay in cache, and a run of queries at a time against the keys that they
can see at all; the backward pass makes the probabilities again from q and k, so that nothing of size Q x K is kept
between the passes (as FlashAttention does, arXiv 2205.14135).

Letters: g key-value heads, r query heads of one key-value head, n queries, m keys, d head_dim.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.attention.plan import Plan
from dlm_jax.attention.tiles import Runs, reach

NEVER = -1e30
SCORES = 2**20  # of so many sequences at a time that their scores stay in cache
QUERIES = 64  # a run of queries: shorter wastes less of the diagonal, longer multiplies faster


def attend_cpu(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
    """As `attend_dense`, under a plan: q [b, n, heads, d], k and v [b, m, kv_heads, d]."""
    b, n, h, d = q.shape
    g = k.shape[2]
    q = q.reshape(b, n, g, h // g, d).transpose(0, 2, 3, 1, 4) * d**-0.5
    out = _attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), plan)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, n, h, d)


def by_sequence(function: Callable, *arrays: jax.Array, plan: Plan) -> Any:
    """`function(*arrays of one sequence, its plan)` for each sequence of the batch, as many at once as SCORES allows; a
    plan of batch 1 serves all."""
    (b, g, r, n, _), m = arrays[0].shape, arrays[1].shape[2]
    together = min(b, max(1, SCORES // (g * r * n * m)))
    if plan.lo.shape[0] == 1:
        alone = jax.tree.map(lambda x: x[0], plan)
        return jax.lax.map(lambda x: function(*x, alone), arrays, batch_size=together)
    return jax.lax.map(lambda x: function(*x), (*arrays, plan), batch_size=together)


def parts(plan: Plan, queries: int, keys: int) -> Iterator[tuple[slice, Runs]]:
    """Runs of queries, each with the runs of keys that it can see; neighbours that see the same are one."""
    runs = [((0, keys),)] if plan.rule is None else reach(plan.rule, keys, QUERIES)
    size = queries if plan.rule is None else QUERIES
    start = 0
    for i, seen in enumerate(runs):
        if i + 1 == len(runs) or runs[i + 1] != seen:
            yield slice(start, min((i + 1) * size, queries)), seen
            start = (i + 1) * size


def pick(x: jax.Array, runs: Runs) -> jax.Array:
    """The keys of some runs: [g, m, d] -> [g, fewer, d]."""
    return jnp.concatenate([x[:, lo:hi] for lo, hi in runs], 1) if len(runs) > 1 else x[:, runs[0][0]:runs[0][1]]


def exponentials(q: jax.Array, k: jax.Array, plan: Plan, runs: Runs) -> tuple[jax.Array, jax.Array]:
    """The softmax over the visible keys of some runs before its division, in fp32: [g, r, n, m] from q [g, r, n, d] and
    k [g, m, d], 0 where none is visible; and the divisor [g, r, n, 1]."""
    mask = plan.visible(np.concatenate([np.arange(lo, hi, dtype=np.int32) for lo, hi in runs]))
    scores = jnp.einsum("grnd,gmd->grnm", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    scores = jnp.where(mask, scores, NEVER)
    most = jnp.max(scores, -1, keepdims=True, initial=0.1 * NEVER)  # a row that sees nothing gets zeros
    weights = jnp.exp(scores - most)
    return weights, jnp.maximum(jnp.sum(weights, -1, keepdims=True), 1e-30)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
    def one(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
        out = []
        for rows, runs in parts(static, q.shape[2], k.shape[1]):
            weights, total = exponentials(q[:, :, rows], pick(k, runs), plan.queries(rows.start, rows.stop), runs)
            values = jnp.einsum("grnm,gmd->grnd", weights.astype(v.dtype), pick(v, runs))
            out.append((values / total).astype(v.dtype))
        return jnp.concatenate(out, 2)

    static = plan
    return by_sequence(one, q, k, v, plan=plan)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> tuple[jax.Array, tuple]:
    out = _attend(q, k, v, plan)
    return out, (q, k, v, plan, out)


def _backward(residuals: tuple, d_out: jax.Array) -> tuple:
    q, k, v, plan, out = residuals
    static = plan

    def one(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, d_out: jax.Array,
            plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
        dq, dk, dv = [], jnp.zeros_like(jnp.swapaxes(k, 1, 2)), jnp.zeros_like(jnp.swapaxes(v, 1, 2))
        for rows, runs in parts(static, q.shape[2], k.shape[1]):
            dq_part, dk_part, dv_part = _backward_part(
                q[:, :, rows], pick(k, runs), pick(v, runs), out[:, :, rows], d_out[:, :, rows],
                plan.queries(rows.start, rows.stop), runs)
            dq.append(dq_part)
            taken = 0
            for lo, hi in runs:
                dk = dk.at[:, :, lo:hi].add(dk_part[:, :, taken:taken + hi - lo])
                dv = dv.at[:, :, lo:hi].add(dv_part[:, :, taken:taken + hi - lo])
                taken += hi - lo
        return jnp.concatenate(dq, 2), dk, dv

    dq, dk, dv = by_sequence(one, q, k, v, out, d_out, plan=plan)
    return dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), None


def _backward_part(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, d_out: jax.Array, plan: Plan,
                   runs: Runs) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of some queries: dq [g, r, n, d], and what they add to dk and dv, transposed: [g, d, m].

    The sums over queries come out transposed, and are turned outside the loop: asked for in [m, d], XLA's CPU compiler
    turns the large operand instead (8 times slower).
    """
    weights, total = exponentials(q, k, plan, runs)
    p = weights / total
    dp = jnp.einsum("grnd,gmd->grnm", d_out, v, preferred_element_type=p.dtype)
    ds = (p * (dp - jnp.sum(d_out.astype(p.dtype) * out, -1, keepdims=True))).astype(q.dtype)
    dq = jnp.einsum("grnm,gmd->grnd", ds, k)
    d_keys = [jnp.einsum("gdn,gnm->gdm", jnp.swapaxes(flat(x), 1, 2), flat(y))
              for x, y in ((q, ds), (d_out, p.astype(d_out.dtype)))]
    return dq, d_keys[0], d_keys[1]


def flat(x: jax.Array) -> jax.Array:
    """The query heads of a key-value head one after the other: [g, r, n, d] -> [g, r n, d]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


_attend.defvjp(_forward, _backward)
