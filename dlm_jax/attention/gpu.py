"""Attention for Hopper GPUs (H100, H200), by Pallas Mosaic GPU: tiles that hold nothing visible are never visited.

Every tile of queries has a list of the tiles of keys that it visits, in all regions, and every tile of keys one of the
tiles of queries that visit it; the kernels (`dlm_jax.attention.gpu_kernels`) walk these lists. The backward pass makes
the probabilities again from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691): one kernel for dQ, one for dK
and dV. Sums are made in a fixed order, so results are the same in every run.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from flax import struct

from dlm_jax.attention import gpu_kernels as kernels
from dlm_jax.attention.gpu_parts import LOADER, ROWS, SHORT_STAGES, STAGES
from dlm_jax.attention.plan import Plan
from dlm_jax.attention.tiles import TILE
from dlm_jax.errors import UserError


@struct.dataclass
class Orders:
    """A plan as the kernels read it.

    rows: int32 [batch or 1, channels, Q] (`row_channels`); queries, keys: the lists of `visits`, of the tiles of
    queries and of the tiles of keys.
    """

    rows: Any
    queries: Any
    keys: Any
    regions: int = struct.field(pytree_node=False)
    edges: bool = struct.field(pytree_node=False)


def attend_gpu(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan, interpret: Any = False) -> jax.Array:
    """As `attend_dense`, under a plan, with gradients for q, k and v.

    q: [batch, Q, heads, head_dim]; k, v: [batch, K, kv_heads, head_dim]; bfloat16 or float16, head_dim at most 128.
    interpret: what `plgpu.kernel` takes to run on a CPU. Returns [batch, Q, heads, head_dim] in q's dtype.
    Raises `UserError` for other dtypes (the tensor cores of a Hopper multiply no float32) and larger heads.
    """
    b, n, _, d = q.shape
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        raise UserError(f"attention on a GPU takes q, k and v all in bfloat16 or all in float16, not {q.dtype}, "
                        f"{k.dtype} and {v.dtype}; use the implementation `reference` for these")
    if d > 128:
        raise UserError(f"attention on a GPU takes heads of up to 128 dimensions, not {d}; "
                        "use the implementation `reference` for these")
    wide = 64 if d <= 64 else 128

    def padded(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, wide - d)))

    run = functools.partial(_attend, interpret, d**-0.5)
    return run(*map(padded, (q, k, v)), orders(plan, k.shape[1]))[:, :n, :, :d]


def orders(plan: Plan, keys: int) -> Orders:
    """The plan as the kernels read it; numpy where the plan is."""
    xp, regions = plan.tiles.__array_namespace__(), plan.lo.shape[1]
    first, full, full_end, end = (plan.tiles[..., i, None] for i in range(4))  # [batch or 1, regions, tiles, 1]
    tile = xp.arange(-(-keys // TILE), dtype="int32")
    visited = xp.permute_dims((first <= tile) & (tile < end), (0, 2, 3, 1))  # [batch or 1, queries, keys, regions]
    partial = xp.permute_dims((tile < full) | (full_end <= tile), (0, 2, 3, 1))
    swapped = (xp.permute_dims(x, (0, 2, 1, 3)) for x in (visited, partial))
    return Orders(row_channels(plan), visits(visited, partial), visits(*swapped), regions, plan.edges is not None)


def row_channels(plan: Plan) -> Any:
    """What a kernel knows of the rows: int32 [batch or 1, channels, Q padded to TILE], the channels lo and hi of each
    region, and where there are `edges`, sure, row and threshold of these. Rows that pad see nothing."""
    xp = plan.lo.__array_namespace__()
    channels = xp.stack([plan.lo, plan.hi], 2).reshape(plan.lo.shape[0], -1, plan.lo.shape[-1])
    if plan.edges is not None:
        row = jax.lax.bitcast_convert_type(plan.edges.row, jnp.int32)
        more = jnp.stack(jnp.broadcast_arrays(plan.edges.sure, row, plan.edges.threshold), 1)
        shape = (max(more.shape[0], channels.shape[0]),)
        channels = jnp.concatenate([jnp.broadcast_to(x, shape + x.shape[1:]) for x in (channels, more)], 1)
        xp = jnp
    return xp.pad(channels, ((0, 0), (0, 0), (0, -channels.shape[-1] % TILE)))


def visits(visited: Any, partial: Any) -> Any:
    """The work list of each tile: int32 [batch or 1, tiles, 2 + visits], the longest lists first, since what starts
    last should be short: the tile's number, the count of its visits, and a code a visit (`gpu_parts.visit`).

    visited, partial: bool [batch or 1, tiles, other tiles, regions].
    """
    xp = visited.__array_namespace__()
    flat = visited.shape[:2] + (-1,)
    code = 2 * xp.arange(visited[0, 0].size, dtype="int32") + partial.reshape(flat)
    visited = visited.reshape(flat)
    code = xp.take_along_axis(code, xp.argsort(~visited, axis=-1, stable=True), -1)
    count = visited.sum(-1)
    lists = xp.concatenate([count[..., None], code], -1)
    tile = xp.argsort(-count, axis=-1, stable=True)[..., None]
    return xp.concatenate([tile, xp.take_along_axis(lists, tile, 1)], -1).astype("int32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, order: Orders) -> jax.Array:
    return forward(interpret, scale, q, k, v, order)[0]


def _forward(interpret: Any, scale: float, *arguments: Any) -> tuple[jax.Array, tuple]:
    o, lse = forward(interpret, scale, *arguments)
    return o, (*arguments, o, lse)


def _backward(interpret: Any, scale: float, residuals: tuple, d_o: jax.Array) -> tuple:
    q, k, v, order, o, lse = residuals
    delta = jnp.sum(o.astype(jnp.float32) * d_o, -1).swapaxes(1, 2)
    arguments = q, k, v, d_o, lse, delta, order
    return d_queries(interpret, scale, *arguments), *d_keys(interpret, scale, *arguments), None


_attend.defvjp(_forward, _backward)


def forward(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array,
            order: Orders) -> tuple[jax.Array, jax.Array]:
    """The output [batch, Q, heads, d], and the log-sum-exp of base 2 of the scores, fp32 [batch, heads, Q].

    q: [batch, Q, heads, d]; k, v: [batch, K, kv_heads, d]; Q and K multiples of TILE, d 64 or 128.
    """
    b, n, h, d = q.shape
    halves, tiles = (2, ROWS, d), (STAGES, TILE, d)
    smem = (plgpu.SMEM(halves, q.dtype), plgpu.SMEM(tiles, q.dtype), plgpu.SMEM(tiles, q.dtype),
            rows_smem(order, 2), plgpu.SMEM((2, ROWS), jnp.float32))
    scratch = (smem, (loads(2), *stages(STAGES, 1, 1)), stages(STAGES, 2, 2), plgpu.Barrier(num_arrivals=2),
               spill(interpret, TILE, d, q.dtype))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32)
    launch = launcher(kernels.forward, interpret, scale, order, out, (h, n // TILE, b), scratch)
    return launch(q, k, v, order.rows, order.queries)


def d_queries(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, d_o: jax.Array, lse: jax.Array,
              delta: jax.Array, order: Orders) -> jax.Array:
    """The gradient of q; shapes as in `forward`, delta: fp32 [batch, heads, Q], the sums of o d_o."""
    b, n, h, d = q.shape
    halves, tiles, row = (2, ROWS, d), (STAGES, TILE, d), plgpu.SMEM((2, ROWS), jnp.float32)
    smem = (*(plgpu.SMEM(shape, q.dtype) for shape in (halves, halves, tiles, tiles)), rows_smem(order, 2), row, row)
    scratch = smem, (loads(5), *stages(STAGES, 1, 1)), stages(STAGES, 2, 2), spill(interpret, TILE, d, q.dtype)
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    launch = launcher(kernels.d_queries, interpret, scale, order, out, (h, n // TILE, b), scratch)
    return launch(q, k, v, d_o, lse, delta, order.rows, order.queries)


def d_keys(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, d_o: jax.Array, lse: jax.Array,
           delta: jax.Array, order: Orders) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v; arguments as in `d_queries`."""
    b, n, h, d = k.shape
    halves, steps, row = (2, ROWS, d), (SHORT_STAGES, ROWS, d), plgpu.SMEM((SHORT_STAGES, ROWS), jnp.float32)
    smem = (*(plgpu.SMEM(shape, q.dtype) for shape in (halves, halves, steps, steps)), row, row,
            rows_smem(order, SHORT_STAGES))
    scratch = (smem, (loads(2), *stages(SHORT_STAGES, 3, 2)), stages(SHORT_STAGES, 2, 2),
               spill(interpret, ROWS, d, q.dtype))
    out = jax.ShapeDtypeStruct(k.shape, k.dtype)
    launch = launcher(kernels.d_keys, interpret, scale, order, (out, out), (h, n // TILE, b), scratch)
    return launch(q, k, v, d_o, lse, delta, order.rows, order.keys)


def rows_smem(order: Orders, count: int) -> Any:
    """Room for what is known of `count` x ROWS queries."""
    return plgpu.SMEM((count, order.rows.shape[1], ROWS), jnp.int32)


def loads(arrays: int) -> plgpu.Barrier:
    """The barrier of what is loaded once: a tile of each of some arrays, in two halves."""
    return plgpu.Barrier(num_arrivals=2 * arrays)


def stages(count: int, *arrivals: int) -> tuple[plgpu.Barrier, ...]:
    """A barrier for each of `count` stages, for each of some operands."""
    return tuple(plgpu.Barrier(num_arrivals=n, num_barriers=count) for n in arrivals)


def spill(interpret: Any, width: int, d: int, dtype: Any) -> Any:
    """See `gpu_parts.product`."""
    return (plgpu.SMEM((2, ROWS, width), dtype), plgpu.SMEM((2, d, width), dtype)) if interpret else None


def launcher(kernel: Callable, interpret: Any, scale: float, order: Orders, out: Any, grid: tuple[int, int, int],
             scratch: tuple) -> Callable:
    """A kernel over (heads, tiles, batch), heads changing fastest, so that those that share keys run together."""
    return plgpu.kernel(
        functools.partial(kernel, regions=order.regions, edges=order.edges, scale=scale),
        out_type=out, scratch_types=scratch, grid=grid, grid_names=("head", "tile", "batch"),
        num_threads=LOADER + 1, thread_name="wg", interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
