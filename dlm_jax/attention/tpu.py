"""Attention on TPUs: the array layouts around the kernels of `tpu_kernels`, and their joint gradient.

Letters in shapes: b batch, g key-value heads, r query heads per key-value head, N queries, K keys, d head_dim. N and K
are padded to multiples of a tile, and d to a multiple of TILE. The kernels read and write [b, N, g r d] and [b, K, g d]
in place, as the products of the projections leave them and need them: a transpose would move every array through
memory once more. A block is a tile of queries of the size that the kernels use, a multiple of TILE.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.plan import Plan
from dlm_jax.attention.tiles import TILE, coarsen
from dlm_jax.attention.tpu_kernels import KernelSchedule, backward_kernel, forward_kernel
from dlm_jax.errors import UserError
from dlm_jax.typing import Array, Float, Int32, shape_checked

LOG2_E = math.log2(math.e)
WORK = 16 << 20  # bytes of VMEM for all but the keys and values: queries, scores, accumulators


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the tiling depends on."""

    vmem: int  # bytes of on-chip memory
    # How many rows (query heads of a key-value head x queries) a tile needs to keep the matrix unit busy, measured in
    # bundles (docs/performance.md).
    rows: int


def current_chip() -> Chip:
    """The chip that the program is traced for."""
    info = pltpu.get_tpu_info()
    return Chip(info.vmem_capacity_bytes, 2 * info.mxu_column_size)


@shape_checked
def attend_tpu(q: Float[Array, "b Q h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"], plan: Plan,
               chip: Chip | None = None, interpret: Any = False) -> Float[jax.Array, "b Q h k"]:
    """As `attend_dense`, under a plan, with gradients for q, k and v; one float dtype, any lengths and any head_dim.

    chip: by default the one that the program is traced for. interpret: passed on to `pl.pallas_call`.
    Raises `UserError` where one key-value head has more query heads than a tile of rows can hold (16 on v4, else 32).
    """
    b, queries, h, d = q.shape
    g = k.shape[2]
    chip = chip or current_chip()
    block = max(TILE, chip.rows * g // h // TILE * TILE)
    if h // g * block > min(4096, chip.vmem >> 13):
        raise UserError(f"{h // g} query heads on one key-value head are more than the TPU kernel holds at once; use "
                        f"the attention implementation 'reference'")
    q, k, v = flatten_heads(q.astype(k.dtype), block), flatten_heads(k, TILE), flatten_heads(v, TILE)
    call = Call(g, h // g, LOG2_E / math.sqrt(d), plan.edges is not None, chip, interpret)
    o = _attend(call, q, k, v, *pack_plan(plan, block))
    return o.reshape(*o.shape[:2], h, -1)[:, :queries, :, :d]


def flatten_heads(x: Array, tile: int) -> jax.Array:
    """[b, n, heads, d] as [b, n, heads d], with zeros up to a multiple of `tile` tokens and of TILE values per head."""
    x = pad(pad(x, -1, TILE), 1, tile)
    return x.reshape(*x.shape[:2], -1)


def pad(x: Array, axis: int, multiple: int) -> jax.Array:
    """`x` with zeros appended to an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, widths)


def pack_plan(plan: Plan, block: int) -> tuple[jax.Array, jax.Array]:
    """A plan as the kernels read it: (scalars, rows).

    scalars: int32 [...], the bounds of each block, then the threshold of the random edges, if there are any.
    rows: int32 [b or 1, N / block, R, block], the data per query: lo and hi of each region, then `always_visible_end`
    and `query_hash` of the random edges, if there are any.
    """
    assert plan.tiles is not None
    rows = jnp.stack([plan.lo, plan.hi], 2).reshape(plan.lo.shape[0], -1, plan.lo.shape[-1])
    scalars = [jnp.ravel(coarsen(plan.tiles, block // TILE))]
    if plan.edges is not None:
        edges = jnp.stack([plan.edges.always_visible_end, plan.edges.query_hash.astype(jnp.int32)], 1)
        rows = jnp.concatenate([rows, jnp.broadcast_to(edges, (rows.shape[0], *edges.shape[1:]))], 1)
        scalars.append(plan.edges.threshold[0])
    rows = pad(rows, -1, block)
    return jnp.concatenate(scalars), rows.reshape(*rows.shape[:2], -1, block).transpose(0, 2, 1, 3)


@dataclasses.dataclass(frozen=True)
class Call:
    """What both passes of one call of attention know at compile time."""

    kv_heads: int
    group: int  # query heads of a key-value head
    scale: float  # of the scores, in units of log 2
    annealed: bool
    chip: Chip
    interpret: Any

    def schedule(self, k: jax.Array, rows: jax.Array, bytes_per_value: int) -> tuple[KernelSchedule, int]:
        """The schedule whose pieces of keys leave enough of the chip's memory, at `bytes_per_value` for each of
        keys x d values, and the bytes that one piece takes."""
        tiles, d = k.shape[1] // TILE, k.shape[2] // self.kv_heads
        available = max(self.chip.vmem // 2, self.chip.vmem - WORK)
        piece = -(-tiles // -(-tiles * TILE * d * bytes_per_value // available))
        chunk = min(4, max(1, 4096 // (self.group * rows.shape[3])))
        schedule = KernelSchedule(rows.shape[2] // 2 - self.annealed, piece, chunk, rows.shape[0] > 1, self.annealed,
                                  self.scale)
        return schedule, piece * TILE * d * bytes_per_value


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call: Call, q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, rows: jax.Array) -> jax.Array:
    return _forward(call, q, k, v, scalars, rows)[0]


def _forward(call: Call, q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array,
             rows: jax.Array) -> tuple[jax.Array, tuple]:
    (b, keys, _), (_, tiles, data, block), g, r = k.shape, rows.shape, call.kv_heads, call.group
    d, wide = k.shape[2] // g, jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = checkpoint_name(q, "qk"), checkpoint_name(k, "qk"), checkpoint_name(v, "v")
    # Both k and v are prefetched for the next head while those of this head are in use.
    schedule, piece_bytes = call.schedule(k, rows, 4 * k.dtype.itemsize)
    size = schedule.piece * TILE
    kv_spec = pl.BlockSpec((1, size, d), lambda b, g, i, piece, _: (b, piece, g))
    o, lse = pl.pallas_call(
        functools.partial(forward_kernel, schedule=schedule),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(b, g, tiles, pl.cdiv(keys, size)),
            in_specs=[row_spec(rows), query_spec(block, r * d), kv_spec, kv_spec],
            out_specs=[query_spec(block, r * d), vector_spec(r * block)],
            scratch_shapes=[pltpu.VMEM((r * block, d), q.dtype), pltpu.VMEM((r * block, TILE), wide),
                            pltpu.VMEM((r * block, TILE), wide), pltpu.VMEM((r * block, d), wide),
                            pltpu.VMEM((data, block, TILE), jnp.int32),
                            pltpu.VMEM((block, schedule.widths[0] * TILE), jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, g, tiles, 1, r * block), wide)],
        compiler_params=compiler_params(call.chip, 4, piece_bytes),
        interpret=call.interpret, name="attention_forward")(scalars, rows, q, k, v)
    o, lse = checkpoint_name(o, "attention"), checkpoint_name(lse, "attention")
    return o, (q, k, v, scalars, rows, o, lse)


def _backward(call: Call, residuals: tuple, do: jax.Array) -> tuple:
    q, k, v, scalars, rows, o, lse = residuals
    # k, v, dk and dv are double-buffered, and dk and dv accumulate in the wide dtype.
    schedule, piece_bytes = call.schedule(k, rows, 8 * k.dtype.itemsize + 2 * lse.dtype.itemsize)
    params = compiler_params(call.chip, 3, piece_bytes)
    pieces = pl.cdiv(k.shape[1], schedule.piece * TILE)
    arrays = BackwardInputs(scalars, rows, q, k, v, o, do, lse)
    dq, dk_pieces, dv_pieces = None if pieces == 1 else jnp.zeros(q.shape, lse.dtype), [], []
    for piece_index in range(pieces):
        dq, dk, dv = backward_piece(piece_index, dq, arrays, schedule, call, params)
        dk_pieces.append(dk)
        dv_pieces.append(dv)
    dk, dv = (jnp.concatenate(of_pieces, 1)[:, :k.shape[1]] for of_pieces in (dk_pieces, dv_pieces))
    assert dq is not None
    return dq.astype(q.dtype), dk, dv, None, None


class BackwardInputs(NamedTuple):
    """The inputs of `backward_kernel`, in its order. The last is in at least fp32."""

    scalars: Int32[jax.Array, " scalars"]  # see `pack_plan`
    rows: Int32[jax.Array, "b tiles R block"]  # see `pack_plan`; the batch may be 1
    q: Float[jax.Array, "b N grd"]
    k: Float[jax.Array, "b K gd"]
    v: Float[jax.Array, "b K gd"]
    o: Float[jax.Array, "b N grd"]
    do: Float[jax.Array, "b N grd"]  # the gradient of the output
    lse: Float[jax.Array, "b g tiles 1 rows"]  # rows = r block


def backward_piece(piece_index: int, dq: jax.Array | None, arrays: BackwardInputs, schedule: KernelSchedule,
                   call: Call, params: pltpu.CompilerParams) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(dq, dk, dv) of one piece of the keys: dk and dv of this piece [b, piece, g d], and dq summed over the pieces up
    to this one [b, N, g r d], written in place of the `dq` of the earlier pieces (None: there is only one piece)."""
    q, k, lse, g, r = arrays.q, arrays.k, arrays.lse, call.kv_heads, call.group
    (b, _, width), (_, tiles, _, block), wide = k.shape, arrays.rows.shape, lse.dtype
    size, d = schedule.piece * TILE, width // g
    queries = query_spec(block, r * d)
    kv_spec = pl.BlockSpec((1, size, d), lambda b, g, *_: (b, piece_index, g))
    of_piece = pl.BlockSpec((1, size, d), lambda b, g, *_: (b, 0, g))
    earlier_dq = [] if dq is None else [dq]
    pieces = pl.cdiv(k.shape[1], size)
    name = "attention_backward" if pieces == 1 else f"attention_backward_{piece_index + 1}_of_{pieces}"
    return pl.pallas_call(
        functools.partial(backward_kernel, schedule=schedule, piece_index=piece_index),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(b, g, tiles),
            in_specs=[row_spec(arrays.rows), queries, kv_spec, kv_spec, queries, queries, vector_spec(r * block),
                      *[queries] * len(earlier_dq)],
            out_specs=[queries, of_piece, of_piece],
            scratch_shapes=[pltpu.VMEM((r * block, d), q.dtype), pltpu.VMEM((r * block, d), q.dtype),
                            pltpu.VMEM((1, r * block), wide), pltpu.VMEM((d, r * block), wide),
                            pltpu.VMEM((size, d), wide), pltpu.VMEM((size, d), wide),
                            pltpu.VMEM((schedule.widths[0] * TILE, block), jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype if dq is None else wide),
                   *[jax.ShapeDtypeStruct((b, size, width), k.dtype)] * 2],
        input_output_aliases={} if dq is None else {len(arrays): 0},
        compiler_params=params, interpret=call.interpret, name=name)(*arrays, *earlier_dq)


_attend.defvjp(_forward, _backward)


def row_spec(rows: jax.Array) -> pl.BlockSpec:
    """The data per query of one block; shared by all sequences where there is one mask."""
    batched = rows.shape[0] > 1
    return pl.BlockSpec((1, 1, *rows.shape[2:]), lambda b, g, i, *_: (b if batched else 0, i, 0, 0))


def query_spec(block: int, width: int) -> pl.BlockSpec:
    """One block of queries, in all query heads of a key-value head."""
    return pl.BlockSpec((1, block, width), lambda b, g, i, *_: (b, i, g))


def vector_spec(rows: int) -> pl.BlockSpec:
    """One number per row of a block."""
    return pl.BlockSpec((1, 1, 1, 1, rows), lambda b, g, i, *_: (b, g, i, 0, 0))


def compiler_params(chip: Chip, axes: int, piece_bytes: int) -> pltpu.CompilerParams:
    """Batch and heads may be divided over two cores; tiles and pieces run in order. VMEM that the kernel does not ask
    for is left to XLA, which keeps arrays there."""
    semantics = [pltpu.PARALLEL] * 2 + [pltpu.ARBITRARY] * (axes - 2)
    return pltpu.CompilerParams(dimension_semantics=semantics,
                                vmem_limit_bytes=min(chip.vmem * 15 // 16, piece_bytes + WORK))
