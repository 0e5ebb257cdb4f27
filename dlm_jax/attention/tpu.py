"""Attention on TPUs: the layout of the arrays around the kernels of `tpu_kernels`, and their joint gradient.

Letters in shapes: b batch, g key-value heads, r query heads of one of them, N queries, K keys, d head_dim; N and K are
padded to whole tiles.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.plan import Plan
from dlm_jax.attention.tiles import TILE, coarser
from dlm_jax.attention.tpu_kernels import Walk, backward_kernel, forward_kernel
from dlm_jax.errors import UserError

LOG2_E = math.log2(math.e)
WORK = 16 << 20  # bytes of VMEM for all but the keys and values: queries, scores, sums


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the tiling depends on. vmem: bytes of on-chip memory; rows: how many rows (query heads of a key-value head x
    queries) a tile needs to keep the matrix unit busy, measured in bundles (docs/performance.md)."""

    vmem: int
    rows: int


def this_chip() -> Chip:
    """The chip that the program is traced for."""
    info = pltpu.get_tpu_info()
    return Chip(info.vmem_capacity_bytes, 2 * info.mxu_column_size)


def attend_tpu(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan, chip: Chip | None = None,
               interpret: Any = False) -> jax.Array:
    """Attention under a plan, as `attend_dense`: q [b, queries, heads, d], k and v [b, keys, kv_heads, d], of one float
    dtype; any lengths and any d. The default `chip` is the one that is traced for; `interpret` goes to Pallas.

    Raises `UserError` where one key-value head has more query heads than a tile of rows can hold (16 on v4, else 32).
    """
    b, queries, h, d = q.shape
    g = k.shape[2]
    chip = chip or this_chip()
    block = max(TILE, chip.rows * g // h // TILE * TILE)
    if h // g * block > min(4096, chip.vmem >> 13):
        raise UserError(f"{h // g} query heads on one key-value head are more than the TPU kernel holds at once; use "
                        f"the attention implementation 'reference'")
    q = q.reshape(b, queries, g, h // g, d).transpose(0, 2, 3, 1, 4) * (LOG2_E / math.sqrt(d))
    q = pad(pad(q.astype(k.dtype), -2, block), -1, head_dim_of(d))
    k, v = (pad(pad(x.transpose(0, 2, 1, 3), -2, TILE), -1, head_dim_of(d)) for x in (k, v))
    o = _attend(q, k, v, *lay_out(plan, block), plan.edges is not None, chip, interpret)
    return o[..., :queries, :d].transpose(0, 3, 1, 2, 4).reshape(b, queries, h, d)


def head_dim_of(d: int) -> int:
    """What head_dim is padded to a multiple of: beyond a row of lanes, whole rows."""
    return 1 if d <= TILE else TILE


def pad(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """`x` with zeros at the end of an axis, up to a multiple."""
    widths = [(0, 0)] * x.ndim
    widths[axis] = 0, -x.shape[axis] % multiple
    return jnp.pad(x, widths)


def lay_out(plan: Plan, block: int) -> tuple[jax.Array, jax.Array]:
    """A plan as the kernels read it: scalars int32 [...], the bounds of each tile of queries and the threshold of the
    edges; rows int32 [b or 1, N / block, R, block], lo and hi of each region, then `sure` and the hash of the edges."""
    rows = jnp.stack([plan.lo, plan.hi], 2).reshape(plan.lo.shape[0], -1, plan.lo.shape[-1])
    scalars = [jnp.ravel(coarser(plan.tiles, block // TILE))]
    if plan.edges is not None:
        edges = jnp.stack([plan.edges.sure, plan.edges.row.astype(jnp.int32)], 1)
        rows = jnp.concatenate([rows, jnp.broadcast_to(edges, (rows.shape[0], *edges.shape[1:]))], 1)
        scalars.append(plan.edges.threshold[0])
    rows = pad(rows, -1, block)
    return jnp.concatenate(scalars), rows.reshape(*rows.shape[:2], -1, block).transpose(0, 2, 1, 3)


def walk_over(keys: int, q: jax.Array, rows: jax.Array, annealed: bool, chip: Chip,
              bytes_a_value: int) -> tuple[Walk, int]:
    """The walk whose pieces of keys leave enough of the chip's memory, at `bytes_a_value` for each of keys x d,
    and the bytes that they take."""
    tiles, d = keys // TILE, -(-q.shape[-1] // TILE) * TILE
    pieces = -(-tiles * TILE * d * bytes_a_value // max(chip.vmem // 2, chip.vmem - WORK))
    piece = -(-tiles // pieces)
    chunk = min(4, max(1, 4096 // (q.shape[2] * rows.shape[3])))
    walk = Walk(rows.shape[2] // 2 - annealed, piece, chunk, rows.shape[0] > 1, annealed)
    return walk, piece * TILE * d * bytes_a_value


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, rows: jax.Array, annealed: bool, chip: Chip,
            interpret: Any) -> jax.Array:
    return _forward(q, k, v, scalars, rows, annealed, chip, interpret)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, scalars: jax.Array, rows: jax.Array, annealed: bool, chip: Chip,
             interpret: Any) -> tuple[jax.Array, tuple]:
    (b, g, r, _, d), (_, tiles, data, block), keys = q.shape, rows.shape, k.shape[2]
    wide = jnp.promote_types(q.dtype, jnp.float32)
    # Both k and v are read ahead for the next head while this one's are in use.
    walk, bytes_of_keys = walk_over(keys, q, rows, annealed, chip, 4 * k.dtype.itemsize)
    of_keys = pl.BlockSpec((1, 1, walk.piece * TILE, d), lambda b, g, i, number, _: (b, g, number, 0))
    o, lse = pl.pallas_call(
        functools.partial(forward_kernel, walk=walk),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(b, g, tiles, pl.cdiv(keys, walk.piece * TILE)),
            in_specs=[of_rows(rows), of_queries(r, block, d), of_keys, of_keys],
            out_specs=[of_queries(r, block, d), of_vector(r * block)],
            scratch_shapes=[pltpu.VMEM((r * block, TILE), wide), pltpu.VMEM((r * block, TILE), wide),
                            pltpu.VMEM((r * block, d), wide), pltpu.VMEM((data, block, TILE), jnp.int32),
                            pltpu.VMEM((block, walk.widths[0] * TILE), jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, g, tiles, 1, r * block), wide)],
        compiler_params=compiler_params(chip, 4, bytes_of_keys),
        interpret=interpret, name="attention_forward")(scalars, rows, q, k, v)
    return o, (q, k, v, scalars, rows, o, lse)


def _backward(annealed: bool, chip: Chip, interpret: Any, residuals: tuple, do: jax.Array) -> tuple:
    q, k, v, scalars, rows, o, lse = residuals
    delta = jnp.sum(o.astype(lse.dtype) * do.astype(lse.dtype), -1)  # [b, g, r, N]
    delta = delta.reshape(*delta.shape[:3], -1, rows.shape[-1]).swapaxes(2, 3).reshape(lse.shape)
    # k and v come in twice, dk and dv go out twice, and stand in the wide dtype until they are whole.
    bytes_a_value = 8 * k.dtype.itemsize + 2 * lse.dtype.itemsize
    walk, bytes_of_keys = walk_over(k.shape[2], q, rows, annealed, chip, bytes_a_value)
    params = compiler_params(chip, 3, bytes_of_keys)
    pieces = pl.cdiv(k.shape[2], walk.piece * TILE)
    dq, of_pieces = None if pieces == 1 else jnp.zeros(q.shape, lse.dtype), []
    for number in range(pieces):
        dq, *of_piece = backward_piece(number, dq, (scalars, rows, q, k, v, do, lse, delta), walk, params, interpret)
        of_pieces.append(of_piece)
    dk, dv = (jnp.concatenate(parts, 2)[:, :, :k.shape[2]] for parts in zip(*of_pieces))
    assert dq is not None
    return dq.astype(q.dtype), dk, dv, None, None


def backward_piece(number: int, dq: jax.Array | None, arrays: tuple[jax.Array, ...], walk: Walk,
                   params: pltpu.CompilerParams, interpret: Any) -> tuple[jax.Array, ...]:
    """dq of the keys up to piece `number`, in place of `dq` of those before it (None: there is only this one); dk and
    dv of that piece."""
    _, rows, q, k, v, _, lse, _ = arrays
    (b, g, r, _, d), (_, tiles, _, block), wide = q.shape, rows.shape, lse.dtype
    size = walk.piece * TILE
    queries, vector = of_queries(r, block, d), of_vector(r * block)
    of_keys = pl.BlockSpec((1, 1, size, d), lambda b, g, *_: (b, g, number, 0))
    of_piece = pl.BlockSpec((1, 1, size, d), lambda b, g, *_: (b, g, 0, 0))
    before = [] if dq is None else [dq]
    return pl.pallas_call(
        functools.partial(backward_kernel, walk=walk, number=number),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=(b, g, tiles),
            in_specs=[of_rows(rows), queries, of_keys, of_keys, queries, vector, vector, *[queries] * len(before)],
            out_specs=[queries, of_piece, of_piece],
            scratch_shapes=[pltpu.VMEM((d, r * block), wide), pltpu.VMEM((size, d), wide), pltpu.VMEM((size, d), wide),
                            pltpu.VMEM((walk.widths[0] * TILE, block), jnp.float32)]),
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype if dq is None else wide),
                   *[jax.ShapeDtypeStruct((b, g, size, d), k.dtype)] * 2],
        input_output_aliases={} if dq is None else {len(arrays): 0},
        compiler_params=params, interpret=interpret, name="attention_backward")(*arrays, *before)


_attend.defvjp(_forward, _backward)


def of_rows(rows: jax.Array) -> pl.BlockSpec:
    """The data of a tile's rows; the same for all sequences where there is one mask."""
    batched = rows.shape[0] > 1
    return pl.BlockSpec((1, 1, *rows.shape[2:]), lambda b, g, i, *_: (b if batched else 0, i, 0, 0))


def of_queries(r: int, block: int, d: int) -> pl.BlockSpec:
    """A tile of queries, of all query heads of a key-value head."""
    return pl.BlockSpec((1, 1, r, block, d), lambda b, g, i, *_: (b, g, 0, i, 0))


def of_vector(rows: int) -> pl.BlockSpec:
    """A number for each row of a tile."""
    return pl.BlockSpec((1, 1, 1, 1, rows), lambda b, g, i, *_: (b, g, i, 0, 0))


def compiler_params(chip: Chip, axes: int, bytes_of_keys: int) -> pltpu.CompilerParams:
    """Batch and heads may run on two cores; tiles and pieces in order. What the kernel does not ask for is left to XLA,
    which keeps arrays there."""
    order = [pltpu.PARALLEL] * 2 + [pltpu.ARBITRARY] * (axes - 2)
    return pltpu.CompilerParams(dimension_semantics=order,
                                vmem_limit_bytes=min(chip.vmem * 15 // 16, bytes_of_keys + WORK))
