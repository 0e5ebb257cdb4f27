"""Attention for Hopper GPUs (H100, H200), by Pallas Mosaic GPU: tiles that hold nothing visible are never visited.

A visit is one tile of keys against one tile of queries, in one region. Every tile of queries has a work list of its
visits, and so has every tile of keys; the kernels (`dlm_jax.attention.gpu_kernels`) follow these lists. The backward
pass recomputes the probabilities from the saved log-sum-exp (FlashAttention-2, arXiv 2307.08691): one kernel for dQ,
one for dK and dV. Sums are accumulated in a fixed order, so every run gives the same result.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dlm_jax import struct
from dlm_jax.attention.gpu_kernels import d_keys_kernel, d_queries_kernel, forward_kernel
from dlm_jax.attention.gpu_parts import LOADER, ROWS, SHORT_STAGES, STAGES
from dlm_jax.attention.plan import Plan
from dlm_jax.attention.tiles import TILE
from dlm_jax.errors import UserError
from dlm_jax.typing import Array, Bool, Float, Int32, shape_checked


@struct.dataclass
class VisitLists:
    """A plan as the kernels read it. The batch axis is 1 where every sequence has the same mask."""

    rows: Int32[Array, "b channels Q"]  # see `row_channels`
    queries: Int32[Array, "b q_tiles q_list"]  # see `pack_visits`: for each tile of queries, the tiles of keys
    keys: Int32[Array, "b kv_tiles kv_list"]  # for each tile of keys, the tiles of queries
    regions: int = struct.field(pytree_node=False)  # of the plan
    edges: bool = struct.field(pytree_node=False)  # whether the channels include random edges


@shape_checked
def attend_gpu(q: Float[Array, "b Q h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"], plan: Plan,
               interpret: Any = False) -> Float[jax.Array, "b Q h k"]:
    """As `attend_dense`, under a plan, with gradients for q, k and v; bfloat16 or float16, head_dim at most 128.

    interpret: what `plgpu.kernel` takes to run on a CPU.
    Raises `UserError` for other dtypes (Hopper's tensor cores do not multiply float32) and for larger heads.
    """
    b, n, _, d = q.shape
    if {x.dtype for x in (q, k, v)} not in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}):
        raise UserError(f"attention on a GPU takes q, k and v all in bfloat16 or all in float16, not {q.dtype}, "
                        f"{k.dtype} and {v.dtype}; use the implementation `reference` for these")
    if d > 128:
        raise UserError(f"attention on a GPU takes heads of up to 128 dimensions, not {d}; "
                        "use the implementation `reference` for these")
    padded_d = 64 if d <= 64 else 128

    def padded(x: Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE), (0, 0), (0, padded_d - d)))

    run = functools.partial(_attend, interpret, d**-0.5)
    return run(*map(padded, (q, k, v)), visit_lists(plan, k.shape[1]))[:, :n, :, :d]


def visit_lists(plan: Plan, keys: int) -> VisitLists:
    """The plan as the kernels read it; numpy where the plan is."""
    assert plan.tiles is not None
    xp, regions = plan.tiles.__array_namespace__(), plan.lo.shape[1]
    first, full, full_end, end = (plan.tiles[..., i, None] for i in range(4))  # [batch or 1, regions, q_tiles, 1]
    tile = xp.arange(-(-keys // TILE), dtype="int32")
    visited = xp.permute_dims((first <= tile) & (tile < end), (0, 2, 3, 1))  # [batch or 1, q_tiles, kv_tiles, regions]
    partial = xp.permute_dims((tile < full) | (full_end <= tile), (0, 2, 3, 1))
    swapped = (xp.permute_dims(x, (0, 2, 1, 3)) for x in (visited, partial))
    return VisitLists(row_channels(plan), pack_visits(visited, partial), pack_visits(*swapped), regions,
                      plan.edges is not None)


def row_channels(plan: Plan) -> Int32[Array, "b channels Q"]:
    """What a kernel knows about each query, with Q padded to TILE: lo and hi of each region, then, where the plan has
    random edges, their always_visible_end, query_hash and threshold. Padding rows see nothing; the batch may be 1."""
    xp = plan.lo.__array_namespace__()
    channels = xp.stack([plan.lo, plan.hi], 2).reshape(plan.lo.shape[0], -1, plan.lo.shape[-1])
    if plan.edges is not None:
        query_hash = jax.lax.bitcast_convert_type(plan.edges.query_hash, jnp.int32)
        of_edges = jnp.stack(jnp.broadcast_arrays(plan.edges.always_visible_end, query_hash, plan.edges.threshold), 1)
        batch = (max(of_edges.shape[0], channels.shape[0]),)
        channels = jnp.concatenate([jnp.broadcast_to(x, batch + x.shape[1:]) for x in (channels, of_edges)], 1)
        xp = jnp
    return xp.pad(channels, ((0, 0), (0, 0), (0, -channels.shape[-1] % TILE)))


@shape_checked
def pack_visits(visited: Bool[Array, "b tiles others regions"],
                partial: Bool[Array, "b tiles others regions"]) -> Int32[Array, "b tiles list"]:
    """The work list of each tile, as (the tile's index, the number n of its visits, then one code per visit).

    visited, partial: whether this tile and the other tile have a visible pair, and a hidden one, in a region. The codes
    are 2 * (other * regions + region) + partial, in ascending order, and `gpu_parts.decode_visit` takes them apart. All
    lists have the same length: what follows the first n codes is never read. The longest lists come first, because what
    starts last should be short.

    Example: the causal mask of 256 tokens has one region and, per tile of queries, these tiles of keys:

                        keys 0     keys 1
        queries 0       partial    -
        queries 1       full       partial

    For queries 1 the codes are 2 * 0 + 0 = 0 and 2 * 1 + 1 = 3, for queries 0 the code is 2 * 0 + 1 = 1. So the lists
    are [[1, 2, 0, 3], [0, 1, 1, 3]], where the last 3 is never read.
    """
    xp = visited.__array_namespace__()
    flat = visited.shape[:2] + (-1,)
    code = 2 * xp.arange(visited[0, 0].size, dtype="int32") + partial.reshape(flat)
    visited = visited.reshape(flat)
    visited_first = xp.argsort(~visited, axis=-1, stable=True)
    code = xp.take_along_axis(code, visited_first, -1)
    count = visited.sum(-1)
    lists = xp.concatenate([count[..., None], code], -1)
    longest_first = xp.argsort(-count, axis=-1, stable=True)[..., None]
    return xp.concatenate([longest_first, xp.take_along_axis(lists, longest_first, 1)], -1).astype("int32")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, visits: VisitLists) -> jax.Array:
    return launch_forward(interpret, scale, q, k, v, visits)[0]


def _forward(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array,
             visits: VisitLists) -> tuple[jax.Array, tuple]:
    q, k, v = checkpoint_name(q, "qk"), checkpoint_name(k, "qk"), checkpoint_name(v, "v")
    o, lse = (checkpoint_name(x, "attention") for x in launch_forward(interpret, scale, q, k, v, visits))
    return o, (q, k, v, visits, o, lse)


def _backward(interpret: Any, scale: float, residuals: tuple,
              d_o: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, visits, o, lse = residuals
    delta = jnp.sum(o.astype(jnp.float32) * d_o, -1).swapaxes(1, 2)
    dq = launch_d_queries(interpret, scale, q, k, v, d_o, lse, delta, visits)
    dk, dv = launch_d_keys(interpret, scale, q, k, v, d_o, lse, delta, visits)
    return dq, dk, dv, None


_attend.defvjp(_forward, _backward)


def launch_forward(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array,
                   visits: VisitLists) -> tuple[jax.Array, jax.Array]:
    """The output [batch, Q, heads, d], and the log-sum-exp in base 2 of the scores, fp32 [batch, heads, Q].

    q: [batch, Q, heads, d]; k, v: [batch, K, kv_heads, d]; Q and K multiples of TILE, d 64 or 128. scale: what the
    scores q kᵀ are multiplied by.
    """
    b, n, h, d = q.shape
    halves, tiles = (2, ROWS, d), (STAGES, TILE, d)
    smem = (plgpu.SMEM(halves, q.dtype), plgpu.SMEM(tiles, q.dtype), plgpu.SMEM(tiles, q.dtype),
            rows_smem(visits, 2), plgpu.SMEM((2, ROWS), jnp.float32))
    scratch = (smem, (tile_barrier(2), *stage_barriers(STAGES, 1, 1)), stage_barriers(STAGES, 2, 2),
               plgpu.Barrier(num_arrivals=2), spill(interpret, TILE, d, q.dtype))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n), jnp.float32)
    launch = launcher(forward_kernel, interpret, scale, visits, out, (h, n // TILE, b), scratch)
    return launch(q, k, v, visits.rows, visits.queries)


def launch_d_queries(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, d_o: jax.Array,
                     lse: jax.Array, delta: jax.Array, visits: VisitLists) -> jax.Array:
    """The gradient of q; shapes as in `launch_forward`, d_o as q. delta: fp32 [batch, heads, Q], the sum of o d_o over
    d."""
    b, n, h, d = q.shape
    halves, tiles, row = (2, ROWS, d), (STAGES, TILE, d), plgpu.SMEM((2, ROWS), jnp.float32)
    smem = (*(plgpu.SMEM(shape, q.dtype) for shape in (halves, halves, tiles, tiles)), rows_smem(visits, 2), row, row)
    scratch = (smem, (tile_barrier(5), *stage_barriers(STAGES, 1, 1)), stage_barriers(STAGES, 2, 2),
               spill(interpret, TILE, d, q.dtype))
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    launch = launcher(d_queries_kernel, interpret, scale, visits, out, (h, n // TILE, b), scratch)
    return launch(q, k, v, d_o, lse, delta, visits.rows, visits.queries)


def launch_d_keys(interpret: Any, scale: float, q: jax.Array, k: jax.Array, v: jax.Array, d_o: jax.Array,
                  lse: jax.Array, delta: jax.Array, visits: VisitLists) -> tuple[jax.Array, jax.Array]:
    """The gradients of k and v; arguments as in `launch_d_queries`."""
    b, n, h, d = k.shape
    halves, steps, row = (2, ROWS, d), (SHORT_STAGES, ROWS, d), plgpu.SMEM((SHORT_STAGES, ROWS), jnp.float32)
    smem = (*(plgpu.SMEM(shape, q.dtype) for shape in (halves, halves, steps, steps)), row, row,
            rows_smem(visits, SHORT_STAGES))
    scratch = (smem, (tile_barrier(2), *stage_barriers(SHORT_STAGES, 3, 2)), stage_barriers(SHORT_STAGES, 2, 2),
               spill(interpret, ROWS, d, q.dtype))
    out = jax.ShapeDtypeStruct(k.shape, k.dtype)
    launch = launcher(d_keys_kernel, interpret, scale, visits, (out, out), (h, n // TILE, b), scratch)
    return launch(q, k, v, d_o, lse, delta, visits.rows, visits.keys)


def rows_smem(visits: VisitLists, count: int) -> Any:
    """Room for the channels of `count` x ROWS queries."""
    return plgpu.SMEM((count, visits.rows.shape[1], ROWS), jnp.int32)


def tile_barrier(arrays: int) -> plgpu.Barrier:
    """The barrier of what is loaded once: one tile of each of `arrays` arrays, in two halves."""
    return plgpu.Barrier(num_arrivals=2 * arrays)


def stage_barriers(count: int, *arrivals: int) -> tuple[plgpu.Barrier, ...]:
    """For each operand, one barrier per stage; `arrivals` are how many arrivals complete those of each operand."""
    return tuple(plgpu.Barrier(num_arrivals=n, num_barriers=count) for n in arrivals)


def spill(interpret: Any, width: int, d: int, dtype: Any) -> Any:
    """Room for what interpreters multiply, see `gpu_parts.product`; None on hardware."""
    return (plgpu.SMEM((2, ROWS, width), dtype), plgpu.SMEM((2, d, width), dtype)) if interpret else None


def launcher(kernel: Callable, interpret: Any, scale: float, visits: VisitLists, out: Any, grid: tuple[int, int, int],
             scratch: tuple) -> Callable:
    """The launcher of a kernel over the grid (heads, tiles, batch). Heads vary fastest, so heads that share keys run at
    the same time."""
    @functools.wraps(kernel)  # for its name, by which profiles and `dlm aot` know it
    def body(*refs: Any) -> None:
        kernel(*refs, regions=visits.regions, edges=visits.edges, scale=scale)

    return plgpu.kernel(
        body, out_type=out, scratch_types=scratch, grid=grid, grid_names=("head", "tile", "batch"),
        num_threads=LOADER + 1, thread_name="wg", interpret=interpret,
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup))
