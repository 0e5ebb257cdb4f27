"""Splash attention, the kernel that comes with jax: a second opinion on TPUs, and a fallback.

It knows one static mask for a whole batch. It pays for a mask on every tile that is not empty, and its tiles of 512 x
1024 waste more of a diagonal than ours (docs/performance.md).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dlm_jax.attention.plan import Plan, prepare
from dlm_jax.attention.rules import Rule
from dlm_jax.attention.tiles import TILE
from dlm_jax.errors import UserError

Q_TILE, KV_TILE = 512, 1024


def attend_splash(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan, interpret: bool = False) -> jax.Array:
    """Attention under a static plan, as `attend_dense`; lengths and head_dim may be any. Raises `UserError` for packed
    documents, annealing, or a part of the queries."""
    if plan.rule is None or plan.documents:
        raise UserError("attention implementation 'splash' knows one static mask: no packed documents, no annealing "
                        "and no cached keys; use 'tpu'")
    d = q.shape[-1]
    kernel, seen = splash_kernel(plan.rule, k.shape[1], q.shape[2], interpret)
    q, k, v = (padded(x) for x in (q * d**-0.5, k, v))
    out = jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)[:, :seen.size, :, :d]
    return jnp.where(seen[:, None, None], out, 0)  # a row that sees nothing is an average there


def padded(x: jax.Array) -> jax.Array:
    """[b, n, h, d] as [b, h, n, d], with n and d in whole tiles."""
    _, n, _, d = x.shape
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -n % TILE), (0, 0), (0, -d % TILE))), 1, 2)


@functools.lru_cache(maxsize=8)
def splash_kernel(rule: Rule, length: int, heads: int, interpret: bool) -> tuple[Any, np.ndarray]:
    """The kernel of a rule, and which rows see anything: bool [length]."""
    with jax.ensure_compile_time_eval():
        visible = np.asarray(prepare(rule, length).visible(np.arange(length)))[0]
    whole = np.pad(visible, (0, -length % TILE))
    n = whole.shape[0]
    q_tile, kv_tile = (largest_tile(n, most) for most in (Q_TILE, KV_TILE))
    sizes = splash.BlockSizes(
        block_q=q_tile, block_kv=kv_tile, block_kv_compute=min(Q_TILE, kv_tile), block_q_dkv=q_tile,
        block_kv_dkv=kv_tile, block_kv_dkv_compute=min(Q_TILE, kv_tile), block_q_dq=q_tile, block_kv_dq=kv_tile)
    mask = masks.MultiHeadMask([masks.NumpyMask(whole)] * heads)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    return kernel, visible.any(1)


def largest_tile(length: int, most: int) -> int:
    """The largest tile of at most `most` that divides a length of whole tiles."""
    return next(size for size in range(most, 0, -TILE) if length % size == 0)
