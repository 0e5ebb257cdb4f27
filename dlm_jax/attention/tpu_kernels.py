"""The two Pallas kernels of attention on TPUs: forward, and the fused backward.

Both keep the keys and values of a head in VMEM (one piece of them at a time, where they are too long) and iterate over
tiles of queries. For each tile the bounds of `tile_ranges` say which keys to compute. These are taken in kv ranges of
1, 2, 4 or 8 tiles, masked only where something in the range is hidden. So no tile of 128 keys that is entirely hidden
is computed, and a range that hides nothing pays for no mask. The mask is computed once per range and shared by all
query heads of the key-value head.

Letters: r query heads per key-value head, n queries of a tile, m keys of a kv range, d head_dim, R data per query. As
in FlashAttention (arXiv 2205.14135), m_i is the running maximum of the scores, l_i the running sum of the exponentials,
acc the running output, and alpha the factor that rescales l_i and acc when m_i grows. Scores are in units of log 2 (q
is multiplied by log2(e) / sqrt(d)), because the chip computes 2^x. Where rows are counted, r n, those of a head follow
one another; in memory the heads lie side by side, [n, r d].
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from dlm_jax.attention.rules import edge_open
from dlm_jax.attention.tiles import TILE

MASK_VALUE = -1e38  # the score of a hidden key, so far below M_INIT that 2^(MASK_VALUE - M_INIT) is 0
M_INIT = -1e30  # m_i before any key was visible
LN_2 = math.log(2)

KvRangeBody = Callable[[Any, Any, int, bool], None]  # (region, start, width, masked), see `for_each_kv_range`


@dataclasses.dataclass(frozen=True)
class KernelSchedule:
    """What both kernels know at compile time."""

    regions: int  # of the keys
    piece: int  # tiles of keys in VMEM at once
    chunk: int  # tiles of keys whose scores exist at once: more of them spill, fewer starve the matrix unit
    batched: bool  # whether each sequence has its own mask
    annealed: bool  # whether the data per query include random edges
    scale: float  # of the queries

    @property
    def widths(self) -> tuple[int, ...]:
        """How many tiles of keys a kv range may have, widest first."""
        return tuple(width for width in (8, 4, 2, 1) if width <= self.piece)

    def for_each_kv_range(self, scalars: Any, piece_index: Any, body: KvRangeBody) -> None:
        """Calls body(region, start, width, masked) for each kv range that this tile of queries sees in one piece of the
        keys: `width` tiles from tile `start` of the piece.

        Each region is covered left to right, from `first` to `end`. At tile `start`, with left = end - start:

            condition                                     width    masked
            the widest range fits in full .. full_end     8        no
            otherwise, left >= 8                          8        yes
            otherwise, left >= 4                          4        yes
            otherwise, left >= 2                          2        yes
            otherwise                                     1        yes

        In a piece of fewer than 8 tiles, `widths` starts at a smaller width and the first two rows use that one.
        """
        sequence = pl.program_id(0) if self.batched else 0
        tile, tiles = pl.program_id(2), pl.num_programs(2)
        widest = self.widths[0]

        def cover_region(region: Any, _: None) -> None:
            bounds = ((sequence * self.regions + region) * tiles + tile) * 4
            first, full, full_end, end = (jnp.clip(scalars[bounds + i] - piece_index * self.piece, 0, self.piece)
                                          for i in range(4))

            def call_masked(start: Any, width: int, chosen: Any) -> None:
                pl.when(chosen)(lambda: body(region, start, width, True))

            def next_range(start: Any) -> Any:
                unmasked = (start >= full) & (start + widest <= full_end)
                pl.when(unmasked)(lambda: body(region, start, widest, False))
                width = jnp.int32(1)
                for candidate in reversed(self.widths):
                    width = jnp.where(end - start >= candidate, candidate, width)
                for candidate in self.widths:
                    call_masked(start, candidate, jnp.logical_not(unmasked) & (width == candidate))
                return start + width

            lax.while_loop(lambda start: start < end, next_range, first)

        lax.fori_loop(0, self.regions, cover_region, None)

    def chunks(self, start: Any, width: int) -> list[tuple[int, int, Any]]:
        """The chunks of a kv range: (offset in the range, size, slice of the piece), all in keys."""
        size = min(self.chunk, width) * TILE
        return [(offset, size, pl.ds(pl.multiple_of(start * TILE + offset, TILE), size))
                for offset in range(0, width * TILE, size)]

    def bias(self, data: Callable[[int], jax.Array], region: Any, key: jax.Array, scalars: Any) -> jax.Array:
        """0 where a key is visible, MASK_VALUE where it is hidden, in fp32.

        data(i): the i-th datum of each query (see `tpu.pack_plan`), in a shape that broadcasts against `key`,
        int32.
        """
        visible = (data(2 * region) <= key) & (key < data(2 * region + 1))
        if self.annealed:
            always_visible_end, query_hash = data(2 * self.regions), data(2 * self.regions + 1)
            threshold = scalars[scalars.shape[0] - 1]
            always_visible = key < always_visible_end
            visible = visible & (always_visible | edge_open(query_hash.astype(jnp.uint32), key, threshold))
        return jnp.where(visible, 0.0, MASK_VALUE)


def product(a: jax.Array, b: jax.Array, axis_of_a: int, axis_of_b: int) -> jax.Array:
    """The matrix product over the given axes, accumulated in at least fp32; fp32 operands are multiplied exactly."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((axis_of_a,), (axis_of_b,)), ((), ())), precision=precision,
                           preferred_element_type=wide)


def lanes(x: jax.Array, width: int) -> jax.Array:
    """`x` [rows, 128], equal in every lane, as [rows, width]."""
    return x[:, :width] if width <= TILE else jnp.tile(x, (1, width // TILE))


def stack_heads(x: jax.Array, d: int) -> jax.Array:
    """[n, r d] as [r n, d]."""
    heads = [x[:, i:i + d] for i in range(0, x.shape[1], d)]
    return jnp.concatenate(heads, 0) if len(heads) > 1 else x


def unstack_heads(x: jax.Array, n: int) -> jax.Array:
    """[r n, d] as [n, r d]."""
    heads = [x[i:i + n] for i in range(0, x.shape[0], n)]
    return jnp.concatenate(heads, 1) if len(heads) > 1 else x


def scaled(q: jax.Array, scale: float) -> jax.Array:
    """The queries times `scale`, rounded once."""
    return (q.astype(jnp.promote_types(q.dtype, jnp.float32)) * scale).astype(q.dtype)


def forward_kernel(scalars: Any, rows: Any, q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, lse_ref: Any, q: Any,
                   m_ref: Any, l_ref: Any, acc_ref: Any, columns: Any, bias: Any, *,
                   schedule: KernelSchedule) -> None:
    """FlashAttention's online softmax over the grid (batch, kv head, tile of queries, piece of keys).

    Inputs: scalars int32 in SMEM and rows int32 [R, n] (`tpu.pack_plan`); q [n, r d]; k and v [piece, d].
    Outputs: o [n, r d]; lse [1, r n], log2 of the sum of 2^score, +1e30 where nothing is visible.
    Scratch: q [r n, d], scaled; m and l [r n, 128], where each lane of l sums its own keys and the lanes are added at
    the end; acc [r n, d]; columns int32 [R, n, 128], the rows transposed and repeated in every lane; bias [n, m].
    """
    n, (rn, d) = q_ref.shape[1], q.shape
    piece_index = pl.program_id(3)

    @pl.when(piece_index == 0)
    def _() -> None:
        q[...] = scaled(stack_heads(q_ref[0], d), schedule.scale)
        m_ref[...], l_ref[...], acc_ref[...] = (
            jnp.full_like(m_ref, M_INIT), jnp.zeros_like(l_ref), jnp.zeros_like(acc_ref))
        for i in range(rows.shape[2]):
            columns[i] = jnp.broadcast_to(rows[0, 0, i:i + 1], (TILE, n)).T

    def attend_kv_range(region: Any, start: Any, width: int, masked: bool) -> None:
        if masked:
            for i in range(width):
                key = (piece_index * schedule.piece + start + i) * TILE + lax.broadcasted_iota(jnp.int32, (1, TILE), 1)
                bias[:, i * TILE:(i + 1) * TILE] = schedule.bias(lambda i: columns[i], region, key, scalars)
        m_i, l_i, acc = m_ref[...], l_ref[...], acc_ref[...]
        for offset, size, keys in schedule.chunks(start, width):
            s = product(q[...], k_ref[0, keys], 1, 1)
            if masked:
                s = (s.reshape(-1, n, size) + bias[:, offset:offset + size][None]).reshape(rn, size)
            m_prev, m_i = m_i, jnp.maximum(m_i, jnp.max(s, -1, keepdims=True))
            p = jnp.exp2(s - lanes(m_i, size))
            alpha = jnp.exp2(m_prev - m_i)
            l_i = l_i * alpha + sum(p[:, i:i + TILE] for i in range(0, size, TILE))
            acc = acc * lanes(alpha, d) + product(p.astype(v_ref.dtype), v_ref[0, keys], 1, 0)
        m_ref[...], l_ref[...], acc_ref[...] = m_i, l_i, acc

    schedule.for_each_kv_range(scalars, piece_index, attend_kv_range)

    @pl.when(piece_index == pl.num_programs(3) - 1)
    def _() -> None:
        l_i = jnp.broadcast_to(jnp.sum(l_ref[...], -1, keepdims=True), l_ref.shape)
        sees_something = l_i > 0
        o = acc_ref[...] * lanes(jnp.where(sees_something, 1 / l_i, 0.0), d)
        o_ref[0] = unstack_heads(o.astype(o_ref.dtype), n)
        lse = jnp.where(sees_something, m_ref[...] + jnp.log2(l_i), -M_INIT)
        lse_ref[0, 0, 0] = lse.T[:1]


def backward_kernel(scalars: Any, rows: Any, q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any, do_ref: Any, lse: Any,
                    *refs: Any, schedule: KernelSchedule, piece_index: int) -> None:
    """All three gradients from five products, over the grid (batch, kv head, tile of queries), for one piece of keys.

    Scores are transposed, [m, r n], so that what belongs to a query (lse, delta, intervals) is one vector of lanes.

    Inputs: scalars, rows, q, k, v, o and lse as in `forward_kernel`; do [n, r d].
    refs: first dq of the earlier pieces [n, r d], if there are any; then the outputs dq [n, r d], dk and dv [piece, d];
    then the scratch q, scaled, and do [r n, d], delta [1, r n], which is the sum of o do over d, dq [d, r n], dk and dv
    [piece, d], bias [m, n].
    """
    earlier_dq, (dq_ref, dk_ref, dv_ref, q, do, delta, dq, dk, dv, bias) = refs[:-10], refs[-10:]
    n, (rn, d) = q_ref.shape[1], q.shape
    tile = pl.program_id(2)

    @pl.when(tile == 0)
    def _() -> None:
        dk[...], dv[...] = jnp.zeros_like(dk), jnp.zeros_like(dv)

    q[...], do[...] = scaled(stack_heads(q_ref[0], d), schedule.scale), stack_heads(do_ref[0], d)
    o_do = stack_heads(o_ref[0], d).astype(delta.dtype) * do[...].astype(delta.dtype)
    delta[...], dq[...] = jnp.sum(o_do.T, 0, keepdims=True), jnp.zeros_like(dq)

    def differentiate_kv_range(region: Any, start: Any, width: int, masked: bool) -> None:
        if masked:
            first_key = (piece_index * schedule.piece + start) * TILE
            key = first_key + lax.broadcasted_iota(jnp.int32, (width * TILE, 1), 0)
            bias[:width * TILE] = schedule.bias(lambda i: rows[0, 0, pl.ds(i, 1)], region, key, scalars)
        for offset, size, keys in schedule.chunks(start, width):
            k, v = k_ref[0, keys], v_ref[0, keys]
            s = product(k, q[...], 1, 1)
            if masked:
                s = s + jnp.tile(bias[offset:offset + size], (1, rn // n))
            p = jnp.exp2(s - lse[0, 0, 0])
            dv[keys] += product(p.astype(do.dtype), do[...], 1, 0)
            ds = (p * (product(v, do[...], 1, 1) - delta[...])).astype(q.dtype)
            dk[keys] += product(ds, q[...], 1, 0)
            dq[...] += product(k, ds, 0, 0)

    schedule.for_each_kv_range(scalars, piece_index, differentiate_kv_range)
    dq_of_piece = unstack_heads(dq[...].T * (LN_2 * schedule.scale), n)
    dq_ref[0] = (dq_of_piece + earlier_dq[0][0] if earlier_dq else dq_of_piece).astype(dq_ref.dtype)

    @pl.when(tile == pl.num_programs(2) - 1)
    def _() -> None:
        dk_ref[0], dv_ref[0] = (dk[...] * LN_2).astype(dk_ref.dtype), dv[...].astype(dv_ref.dtype)
