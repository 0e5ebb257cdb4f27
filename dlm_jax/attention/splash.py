"""Splash attention, the kernel that ships with jax: a second opinion on TPUs, and a fallback.

It takes one static mask for the entire batch. It pays for a mask on every tile that is not empty, and its tiles of 512
x 1024 waste more of a diagonal than our own (docs/performance.md).
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from dlm_jax.attention.plan import Plan, make_plan
from dlm_jax.attention.rules import Rule
from dlm_jax.attention.tiles import TILE
from dlm_jax.errors import UserError
from dlm_jax.typing import Array, Bool, Float, shape_checked

Q_TILE, KV_TILE = 512, 1024


@shape_checked
def attend_splash(q: Float[Array, "b Q h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"], plan: Plan,
                  interpret: bool = False) -> Float[jax.Array, "b Q h k"]:
    """As `attend_dense`, under a static plan; any length and any head_dim. `interpret` runs it on a CPU.

    Raises `UserError` for packed documents, for annealing, and where the queries are only some of the tokens.
    """
    if plan.rule is None or plan.has_documents:
        raise UserError("attention implementation 'splash' takes one static mask, without packed documents, annealing "
                        "or cached keys; use 'tpu'")
    d = q.shape[-1]
    kernel, sees_something = splash_kernel(plan.rule, k.shape[1], q.shape[2], interpret)
    q, k, v = (checkpoint_name(to_tiles(x), name) for x, name in ((q * d**-0.5, "qk"), (k, "qk"), (v, "v")))
    out = jnp.swapaxes(jax.vmap(kernel)(q, k, v), 1, 2)[:, :sees_something.size, :, :d]
    return jnp.where(sees_something[:, None, None], out, 0)  # splash averages the values where nothing is visible


def to_tiles(x: Array) -> jax.Array:
    """[b, n, h, d] as [b, h, n, d], with n and d padded to multiples of TILE."""
    _, n, _, d = x.shape
    return jnp.swapaxes(jnp.pad(x, ((0, 0), (0, -n % TILE), (0, 0), (0, -d % TILE))), 1, 2)


@functools.lru_cache(maxsize=8)
def splash_kernel(rule: Rule, length: int, heads: int,
                  interpret: bool) -> tuple[Callable[..., jax.Array], Bool[np.ndarray, " Q"]]:
    """The kernel of a rule, and which queries see anything."""
    with jax.ensure_compile_time_eval():
        visible = np.asarray(make_plan(rule, length).visible(np.arange(length)))[0]
    padded = np.pad(visible, (0, -length % TILE))
    n = padded.shape[0]
    q_tile, kv_tile = largest_tile(n, Q_TILE), largest_tile(n, KV_TILE)
    sizes = splash.BlockSizes(
        block_q=q_tile, block_kv=kv_tile, block_kv_compute=min(Q_TILE, kv_tile), block_q_dkv=q_tile,
        block_kv_dkv=kv_tile, block_kv_dkv_compute=min(Q_TILE, kv_tile), block_q_dq=q_tile, block_kv_dq=kv_tile)
    mask = masks.MultiHeadMask([masks.NumpyMask(padded)] * heads)
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret,
                                        residual_checkpoint_name="attention")
    return kernel, visible.any(1)


def largest_tile(length: int, most: int) -> int:
    """The largest multiple of TILE, at most `most`, that divides `length`, itself a multiple of TILE."""
    return next(size for size in range(most, 0, -TILE) if length % size == 0)
