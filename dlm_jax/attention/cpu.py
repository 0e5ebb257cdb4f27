"""Attention for CPUs: the mathematics of `reference.py` in the shapes that a CPU multiplies fast.

It takes a few sequences at a time, so that their scores stay in cache, and a run of queries at a time against only the
keys that these can see. The backward pass recomputes the probabilities from q and k, so nothing of size Q x K is kept
between the passes (as in FlashAttention, arXiv 2205.14135).

Letters: g key-value heads, r query heads per key-value head, n queries, m keys, d head_dim.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from dlm_jax.attention.plan import Plan
from dlm_jax.attention.tiles import KvRuns, static_kv_runs
from dlm_jax.typing import Array, Float, shape_checked

MASK_VALUE = -1e30  # the score of a hidden key
SCORES = 2**20  # scores computed at once, so that they stay in cache
QUERIES = 64  # per run: shorter runs waste less of the diagonal, longer ones multiply faster


@shape_checked
def attend_cpu(q: Float[Array, "b Q h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"],
               plan: Plan) -> Float[jax.Array, "b Q h k"]:
    """As `attend_dense`, under a plan."""
    b, n, h, d = q.shape
    g = k.shape[2]
    if n == 1:
        return attend_one_query(q, k, v, plan)
    q = q.reshape(b, n, g, h // g, d).transpose(0, 2, 3, 1, 4) * d**-0.5
    out = _attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), plan)
    return out.transpose(0, 3, 1, 2, 4).reshape(b, n, h, d)


@shape_checked
def attend_one_query(q: Float[Array, "b 1 h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"],
                     plan: Plan) -> Float[jax.Array, "b 1 h k"]:
    """`attend_cpu` for one query, as in left-to-right decoding, where to turn k and v around would take longer than to
    multiply them. So they stay as they are, all heads side by side, and q has zeros for the heads of others."""
    b, _, h, d = q.shape
    m, g = k.shape[1:3]
    own = jnp.repeat(jnp.eye(g, dtype=q.dtype), h // g, axis=0)  # [h, g]: the key-value head of each head
    q = (q[:, 0, :, None] * own[..., None] * d**-0.5).reshape(b, h, g * d)
    scores = jnp.einsum("bhd,bmd->bhm", q, k.reshape(b, m, g * d),
                        preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    p, l_i = softmax_parts(scores, plan.visible(np.arange(m, dtype=np.int32)))
    acc = jnp.einsum("bhm,bmd->bhd", p.astype(v.dtype), v.reshape(b, m, g * d)).reshape(b, h, g, d)
    return (jnp.einsum("bhgd,hg->bhd", acc, own) / l_i).astype(v.dtype)[:, None]


def map_sequences(function: Callable, *arrays: jax.Array, plan: Plan) -> Any:
    """`function(*arrays of one sequence, its plan)` for each sequence of the batch, as many at once as SCORES allows.
    A plan of batch 1 serves all sequences."""
    (b, g, r, n, _), m = arrays[0].shape, arrays[1].shape[2]
    batch_size = min(b, max(1, SCORES // (g * r * n * m)))
    if plan.lo.shape[0] == 1:
        shared = jax.tree.map(lambda x: x[0], plan)
        return jax.lax.map(lambda x: function(*x, shared), arrays, batch_size=batch_size)
    return jax.lax.map(lambda x: function(*x), (*arrays, plan), batch_size=batch_size)


def query_runs(plan: Plan, queries: int, keys: int) -> Iterator[tuple[slice, KvRuns]]:
    """Runs of queries, each with the runs of keys that it can see. Neighbors that see the same keys are merged."""
    kv_runs = [((0, keys),)] if plan.rule is None else static_kv_runs(plan.rule, keys, QUERIES)
    size = queries if plan.rule is None else QUERIES
    start = 0
    for i, seen in enumerate(kv_runs):
        if i + 1 == len(kv_runs) or kv_runs[i + 1] != seen:
            yield slice(start, min((i + 1) * size, queries)), seen
            start = (i + 1) * size


def take_keys(x: jax.Array, runs: KvRuns) -> jax.Array:
    """The keys of the given runs: [g, m, d] -> [g, fewer, d]."""
    return jnp.concatenate([x[:, lo:hi] for lo, hi in runs], 1) if len(runs) > 1 else x[:, runs[0][0]:runs[0][1]]


def unnormalized_softmax(q: jax.Array, k: jax.Array, plan: Plan, runs: KvRuns) -> tuple[jax.Array, jax.Array]:
    """The softmax over the visible keys of the given runs, before its division, in fp32.

    Takes q [g, r, n, d] and k [g, m, d]. Returns p [g, r, n, m], 0 for hidden keys, and the divisor l_i [g, r, n, 1].
    """
    mask = plan.visible(np.concatenate([np.arange(lo, hi, dtype=np.int32) for lo, hi in runs]))
    scores = jnp.einsum("grnd,gmd->grnm", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    return softmax_parts(scores, mask)


def softmax_parts(scores: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """p [..., m], 0 for hidden keys, and the divisor l_i [..., 1]."""
    scores = jnp.where(mask, scores, MASK_VALUE)
    m_i = jnp.max(scores, -1, keepdims=True, initial=0.1 * MASK_VALUE)  # a query that sees nothing gets zeros
    p = jnp.exp(scores - m_i)
    return p, jnp.maximum(jnp.sum(p, -1, keepdims=True), 1e-30)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
    """The output [b, g, r, n, d] from q [b, g, r, n, d], k and v [b, g, m, d]."""
    def attend_sequence(q: jax.Array, k: jax.Array, v: jax.Array, sequence_plan: Plan) -> jax.Array:
        out = []
        for rows, runs in query_runs(plan, q.shape[2], k.shape[1]):
            p, l_i = unnormalized_softmax(q[:, :, rows], take_keys(k, runs),
                                          sequence_plan.select_queries(rows.start, rows.stop), runs)
            acc = jnp.einsum("grnm,gmd->grnd", p.astype(v.dtype), take_keys(v, runs))
            out.append((acc / l_i).astype(v.dtype))
        return jnp.concatenate(out, 2)

    return map_sequences(attend_sequence, q, k, v, plan=plan)


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> tuple[jax.Array, tuple]:
    q, k, v = checkpoint_name(q, "qk"), checkpoint_name(k, "qk"), checkpoint_name(v, "v")
    out = checkpoint_name(_attend(q, k, v, plan), "attention")
    return out, (q, k, v, plan, out)


def _backward(residuals: tuple, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, plan, out = residuals

    def sequence_gradients(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, d_out: jax.Array,
                           sequence_plan: Plan) -> tuple[jax.Array, jax.Array, jax.Array]:
        """dq [g, r, n, d], and dk and dv transposed: [g, d, m]."""
        dq, dk, dv = [], jnp.zeros_like(jnp.swapaxes(k, 1, 2)), jnp.zeros_like(jnp.swapaxes(v, 1, 2))
        for rows, runs in query_runs(plan, q.shape[2], k.shape[1]):
            dq_rows, dk_rows, dv_rows = _backward_rows(
                q[:, :, rows], take_keys(k, runs), take_keys(v, runs), out[:, :, rows], d_out[:, :, rows],
                sequence_plan.select_queries(rows.start, rows.stop), runs)
            dq.append(dq_rows)
            start = 0
            for lo, hi in runs:
                dk = dk.at[:, :, lo:hi].add(dk_rows[:, :, start:start + hi - lo])
                dv = dv.at[:, :, lo:hi].add(dv_rows[:, :, start:start + hi - lo])
                start += hi - lo
        return jnp.concatenate(dq, 2), dk, dv

    dq, dk, dv = map_sequences(sequence_gradients, q, k, v, out, d_out, plan=plan)
    return dq, jnp.swapaxes(dk, 2, 3), jnp.swapaxes(dv, 2, 3), None


def _backward_rows(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, d_out: jax.Array, plan: Plan,
                   runs: KvRuns) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of one run of queries: dq [g, r, n, d], and what it adds to dk and dv, transposed: [g, d, m].

    The sums over queries come out transposed and are transposed back outside the loop: when asked for [m, d], XLA's CPU
    compiler transposes the large operand instead (8 times slower).
    """
    p, l_i = unnormalized_softmax(q, k, plan, runs)
    p = p / l_i
    dp = jnp.einsum("grnd,gmd->grnm", d_out, v, preferred_element_type=p.dtype)
    ds = (p * (dp - jnp.sum(d_out.astype(p.dtype) * out, -1, keepdims=True))).astype(q.dtype)
    dq = jnp.einsum("grnm,gmd->grnd", ds, k)
    dk = jnp.einsum("gdn,gnm->gdm", jnp.swapaxes(merge_heads(q), 1, 2), merge_heads(ds))
    dv = jnp.einsum("gdn,gnm->gdm", jnp.swapaxes(merge_heads(d_out), 1, 2), merge_heads(p.astype(d_out.dtype)))
    return dq, dk, dv


def merge_heads(x: jax.Array) -> jax.Array:
    """The query heads of each key-value head one after the other: [g, r, n, d] -> [g, r n, d]."""
    return x.reshape(x.shape[0], -1, x.shape[-1])


_attend.defvjp(_forward, _backward)
