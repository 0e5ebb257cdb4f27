"""The two Pallas kernels of attention on TPUs: forward, and the fused backward.

Both keep the keys and values of a head in VMEM (a piece of them, where they are too long) and walk over tiles of
queries. For each tile the bounds of `tile_ranges` say which keys to visit: a visit takes 1, 2, 4 or 8 tiles of keys at
once, with the mask only where something in it is hidden. So nothing that is wholly hidden is computed, to 128 keys, and
a visit that hides nothing pays for no mask. The mask is made once a visit and shared by all query heads of the head.

Letters: r query heads of one key-value head, n queries of a tile, m keys of a visit, d head_dim. Scores are in units of
log 2 (q comes multiplied by log2(e) / sqrt(d)), because the chip's exponential is 2^x.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dlm_jax.attention.rules import edge_open
from dlm_jax.attention.tiles import TILE

NEVER = -1e38  # the score of a hidden key: below FLOOR by so much that 2^(NEVER - FLOOR) is 0
FLOOR = -1e30  # the largest score so far where none was seen
LN_2 = math.log(2)


@dataclasses.dataclass(frozen=True)
class Walk:
    """What both kernels know before they run.

    regions: of the keys; piece: tiles of keys that are in VMEM at once; chunk: tiles of keys whose scores stand at once
    (more of them spill, fewer starve the matrix unit); batched: whether each sequence has its own
    mask; annealed: whether the rows carry edges.
    """

    regions: int
    piece: int
    chunk: int
    batched: bool
    annealed: bool

    @property
    def widths(self) -> tuple[int, ...]:
        """How many tiles of keys a visit may take; the widest may also go without a mask."""
        return tuple(width for width in (8, 4, 2, 1) if width <= self.piece)

    def over_keys(self, scalars: Any, number: Any, visit: Callable[[Any, Any, int, bool], None]) -> None:
        """Calls visit(region, start, width, masked) for the runs of keys that this tile of queries sees in piece
        `number`: `width` tiles of keys from tile `start` of the piece."""
        sequence = pl.program_id(0) if self.batched else 0
        tile, tiles = pl.program_id(2), pl.num_programs(2)

        def region_of_keys(region: Any, _: None) -> None:
            at = ((sequence * self.regions + region) * tiles + tile) * 4
            first, full, full_end, end = (jnp.clip(scalars[at + i] - number * self.piece, 0, self.piece)
                                          for i in range(4))

            def one_visit(start: Any) -> Any:
                plain = (start >= full) & (start + self.widths[0] <= full_end)
                pl.when(plain)(lambda: visit(region, start, self.widths[0], False))
                width = jnp.int32(1)
                for w in reversed(self.widths):
                    width = jnp.where(end - start >= w, w, width)
                for w in self.widths:
                    masked = functools.partial(visit, region, start, w, True)
                    pl.when(jnp.logical_not(plain) & (width == w))(masked)
                return start + width

            lax.while_loop(lambda start: start < end, one_visit, first)

        lax.fori_loop(0, self.regions, region_of_keys, None)

    def chunks(self, start: Any, width: int) -> list[tuple[int, int, Any]]:
        """The chunks of a visit: (offset in the visit, size, where in the piece), in keys."""
        size = min(self.chunk, width) * TILE
        return [(at, size, pl.ds(pl.multiple_of(start * TILE + at, TILE), size)) for at in range(0, width * TILE, size)]

    def bias(self, row: Callable[[Any], jax.Array], region: Any, key: jax.Array, scalars: Any) -> jax.Array:
        """0 where a key is seen, NEVER where it is hidden, fp32. `row(i)` are the i-th data of the rows (see
        `tpu.lay_out`), and broadcast against `key`, int32."""
        seen = (row(2 * region) <= key) & (key < row(2 * region + 1))
        if self.annealed:
            sure, edge = row(2 * self.regions), row(2 * self.regions + 1)
            threshold = scalars[scalars.shape[0] - 1]
            seen = seen & ((key < sure) | edge_open(edge.astype(jnp.uint32), key, threshold))
        return jnp.where(seen, 0.0, NEVER)


def product(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    """Matrix product over the given axes, accumulated in at least fp32; exact products of fp32 operands."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), precision=precision,
                           preferred_element_type=wide)


def lanes(x: jax.Array, width: int) -> jax.Array:
    """`x` [rows, 128], the same in every lane, as [rows, width]."""
    return x[:, :width] if width <= TILE else jnp.tile(x, (1, width // TILE))


def forward_kernel(scalars: Any, rows: Any, q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, lse_ref: Any, peak: Any,
                   total: Any, acc: Any, columns: Any, bias: Any, *, walk: Walk) -> None:
    """Grid (batch, kv head, tile of queries, piece of keys): FlashAttention's online softmax (arXiv 2205.14135).

    rows [R, n]; q, o [r, n, d]; k, v [piece, d]; lse [1, r n], log2 of the sum of 2^score, +1e30 where nothing is seen.
    Scratch: peak, total [r n, 128] (the total apart in every lane, added up at the end), acc [r n, d], columns
    [R, n, 128], bias [n, m].
    """
    r, n, d = q_ref.shape[2:]
    number = pl.program_id(3)

    @pl.when(number == 0)
    def _() -> None:
        peak[...], total[...], acc[...] = jnp.full_like(peak, FLOOR), jnp.zeros_like(total), jnp.zeros_like(acc)
        for i in range(rows.shape[2]):
            columns[i] = jnp.broadcast_to(rows[0, 0, i:i + 1], (TILE, n)).T

    def visit(region: Any, start: Any, width: int, masked: bool) -> None:
        if masked:
            for at in range(width):
                key = (number * walk.piece + start + at) * TILE + lax.broadcasted_iota(jnp.int32, (1, TILE), 1)
                bias[:, at * TILE:(at + 1) * TILE] = walk.bias(lambda i: columns[i], region, key, scalars)
        q, m, z, o = q_ref[0, 0].reshape(r * n, d), peak[...], total[...], acc[...]
        for at, size, keys in walk.chunks(start, width):
            s = product(q, k_ref[0, 0, keys], 1, 1)
            if masked:
                s = (s.reshape(r, n, size) + bias[:, at:at + size][None]).reshape(r * n, size)
            m, before = jnp.maximum(m, jnp.max(s, -1, keepdims=True)), m
            p = jnp.exp2(s - lanes(m, size))
            shrink = jnp.exp2(before - m)
            z = z * shrink + sum(p[:, i:i + TILE] for i in range(0, size, TILE))
            o = o * lanes(shrink, d) + product(p.astype(v_ref.dtype), v_ref[0, 0, keys], 1, 0)
        peak[...], total[...], acc[...] = m, z, o

    walk.over_keys(scalars, number, visit)

    @pl.when(number == pl.num_programs(3) - 1)
    def _() -> None:
        z = jnp.broadcast_to(jnp.sum(total[...], -1, keepdims=True), total.shape)
        seen = z > 0
        o = acc[...] * lanes(jnp.where(seen, 1 / z, 0.0), d)
        o_ref[0, 0] = o.astype(o_ref.dtype).reshape(r, n, d)
        lse = jnp.where(seen, peak[...] + jnp.log2(z), -FLOOR)
        lse_ref[0, 0, 0] = lse.T[:1]


def backward_kernel(scalars: Any, rows: Any, q_ref: Any, k_ref: Any, v_ref: Any, do_ref: Any, lse: Any, delta: Any,
                    *refs: Any, walk: Walk, number: int) -> None:
    """Grid (batch, kv head, tile of queries), for piece `number` of the keys: all three gradients from five products.

    Scores stand transposed, [m, r n]: what belongs to a row (lse, delta, intervals) is then one vector of lanes.
    q, do [r, n, d]; k, v [piece, d]; lse, delta [1, r n], delta the sum of o do over d; then dq of the earlier pieces
    [r, n, d], if there are any; then the outputs dq [r, n, d], dk and dv [piece, d]. Scratch: dq [d, r n],
    dk, dv [piece, d], bias [m, n].
    """
    before, (dq_ref, dk_ref, dv_ref, dq, dk, dv, bias) = refs[:-7], refs[-7:]
    r, n, d = q_ref.shape[2:]
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _() -> None:
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    dq[...] = jnp.zeros_like(dq)

    def visit(region: Any, start: Any, width: int, masked: bool) -> None:
        if masked:
            key = (number * walk.piece + start) * TILE + lax.broadcasted_iota(jnp.int32, (width * TILE, 1), 0)
            bias[:width * TILE] = walk.bias(lambda i: rows[0, 0, pl.ds(i, 1)], region, key, scalars)
        q, do = q_ref[0, 0].reshape(r * n, d), do_ref[0, 0].reshape(r * n, d)
        for at, size, keys in walk.chunks(start, width):
            k, v = k_ref[0, 0, keys], v_ref[0, 0, keys]
            s = product(k, q, 1, 1)
            if masked:
                s = s + jnp.tile(bias[at:at + size], (1, r))
            p = jnp.exp2(s - lse[0, 0, 0])
            dv[keys] += product(p.astype(do.dtype), do, 1, 0)
            ds = (p * (product(v, do, 1, 1) - delta[0, 0, 0])).astype(q.dtype)
            dk[keys] += product(ds, q, 1, 0)
            dq[...] += product(k, ds, 0, 0)

    walk.over_keys(scalars, number, visit)
    total = dq[...].T.reshape(r, n, d) * LN_2
    dq_ref[0, 0] = (total + before[0][0, 0] if before else total).astype(dq_ref.dtype)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        dk_ref[0, 0], dv_ref[0, 0] = (dk[...] * LN_2).astype(dk_ref.dtype), dv[...].astype(dv_ref.dtype)
