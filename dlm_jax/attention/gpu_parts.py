"""Building blocks of the Hopper kernels (`dlm_jax.attention.gpu_kernels`): roles, load, mask, multiply, store.

`Any` stands for a Pallas reference, to device memory, shared memory or a barrier, which has no public type.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dlm_jax.attention.rules import edge_open
from dlm_jax.attention.tiles import TILE

ROWS = 64  # rows of a tile per warpgroup, of which two compute; also the queries per step of `d_keys_kernel`
LOADER = 2  # the index of the warpgroup that loads
STAGES = 2  # all that shared memory holds of keys and values of 128 dimensions, besides the queries
SHORT_STAGES = 4  # in `d_keys_kernel`, whose steps are shorter
M_INIT = -1e30  # m_i before any key was visible: below every score, and finite, so that differences of it are finite
EMPTY_LSE = 1e30  # the log-sum-exp of a row that sees nothing: 2^(s - EMPTY_LSE) = 0
FLOATS = jnp.float32
LOG2_E = math.log2(math.e)


class QueryArrays(NamedTuple):
    """References to the arrays of the backward pass that have queries as rows, in device or in shared memory."""

    q: Any
    d_o: Any
    lse: Any
    delta: Any
    rows: Any


def split_roles(warpgroup: jax.Array, tile_loaded: Any, load: Callable[[], None], compute: Callable[[], None]) -> None:
    """Runs `load` on the warpgroup that loads, and `compute` on the others, once `tile_loaded` completes.

    warpgroup: the index of this warpgroup; tile_loaded: the barrier of what is loaded once. The computing warpgroups
    get the registers that the loader does without.
    """
    @pl.when(warpgroup == LOADER)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load()

    @pl.when(warpgroup < LOADER)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(tile_loaded)
        compute()


def take_turns(turn: Any) -> None:
    """Meets the other computing warpgroup at the barrier `turn`, where they swap turns on the tensor cores."""
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)


def decode_visit(code: jax.Array, regions: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(other tile, region, whether something in it is hidden) of a code of `gpu.pack_visits`."""
    return lax.div(code, 2 * regions), lax.rem(lax.div(code, 2), regions), lax.rem(code, 2) > 0


def decode_step(visits: Any, steps_per_head: jax.Array, kv_head: jax.Array, heads_per_kv_head: int, regions: int,
                t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The head, first query and region of step t of `d_keys_kernel`, and whether something in its tile is hidden.

    The steps of a head are the halves of the tiles on the work list `visits`; the heads that read `kv_head` come one
    after another.
    """
    step_of_head = lax.rem(t, steps_per_head)
    tile, region, partial = decode_visit(visits[2 + lax.div(step_of_head, 2)], regions)
    head = kv_head * heads_per_kv_head + lax.div(t, steps_per_head)
    return head, tile * TILE + lax.rem(step_of_head, 2) * ROWS, region, partial


def batch_index(x: Any, batch: jax.Array) -> jax.Array | int:
    """The index of a sequence in an array whose leading axis is the batch or 1."""
    return batch if x.shape[0] > 1 else 0


def own_spill(spill: tuple | None, warpgroup: jax.Array) -> tuple | None:
    """The part of the interpreters' `spill` (see `product`) that belongs to one warpgroup."""
    return None if spill is None else tuple(x.at[warpgroup] for x in spill)


def product(acc: Any, a: jax.Array, b: Any, spill: tuple | None) -> None:
    """acc += a b, where a is in registers and b a reference.

    spill: None on hardware; in an interpreter a pair of references with room for a left factor and for a transposed
    right one. Unlike the hardware, interpreters multiply only what is in memory, and the one of jax 0.10 only in the
    layout that it has there.
    """
    if spill is not None:
        spill[0][...] = a
        plgpu.commit_smem()
        a = spill[0]
    plgpu.wgmma(acc, a, b)


def product_transposed(acc: Any, a: Any, b: Any, spill: tuple | None) -> None:
    """acc += a bᵀ, of references; `spill` as in `product`."""
    if spill is not None:
        spill[1][...] = b[...].T
        plgpu.commit_smem()
    plgpu.wgmma(acc, a, b.transpose((1, 0)) if spill is None else spill[1])


def product_in_fp32(a: jax.Array, b: Any, spill: tuple | None) -> jax.Array:
    """a b in fp32, where a is in registers and b a reference; `spill` as in `product`."""
    def multiply(acc: Any) -> jax.Array:
        product(acc, a, b, spill)
        return acc[...]

    return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[1]), FLOATS))


def scores_in_turn(q: Any, k: Any, turn: Any, spill: tuple | None) -> jax.Array:
    """q kᵀ in fp32, of references; `turn` as in `take_turns`, `spill` as in `product`."""
    def multiply(s: Any) -> jax.Array:
        product_transposed(s, q, k, spill)
        take_turns(turn)  # the other warpgroup may multiply while this one computes its softmax
        return s[...]

    return pl.run_scoped(multiply, plgpu.ACC((q.shape[0], k.shape[0]), FLOATS))


def mask_scores(s: jax.Array, partial: jax.Array, rows: Any, region: jax.Array, key: jax.Array, axis: int,
                edges: bool) -> jax.Array:
    """The scores s with -inf where the query does not see the key; unchanged unless `partial`.

    rows: int32 [channels, queries], a reference to the channels of `gpu.row_channels`; key: int32, the first key of
    `s`; axis: which axis of `s` is the queries; edges: whether the channels include random edges.
    """
    def over(row: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row, s.shape, (axis,))

    def masked(s: jax.Array) -> jax.Array:
        index = lax.broadcasted_iota(jnp.int32, s.shape, 1 - axis)
        lo, hi = rows[2 * region], rows[2 * region + 1]
        # One comparison for both ends: below lo the unsigned difference wraps around.
        visible = (index - over(lo - key)).astype(jnp.uint32) < over((hi - lo).astype(jnp.uint32))
        if edges:
            keys = key + index
            always_visible_end, query_hash, threshold = (over(rows[rows.shape[0] - 3 + i]) for i in range(3))
            visible &= (keys < always_visible_end) | edge_open(query_hash, keys, threshold)
        return jnp.where(visible, s, -jnp.inf)

    return lax.cond(partial, masked, lambda s: s, s)


def online_softmax(s: jax.Array, m_i: jax.Array, l_i: jax.Array,
                   fold: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One step of FlashAttention's online softmax, in base 2: (p, m_i, l_i, alpha) after the scores s.

    s: fp32 [rows, keys], to be multiplied by `fold`; m_i, l_i: fp32 [rows], the running maximum and the running sum of
    the exponentials. Returns p = 2^(fold s - m_i) and alpha, the factor that rescales earlier sums.
    """
    m_next = jnp.maximum(m_i, jnp.max(s, 1) * fold)
    alpha = jnp.exp2(m_i - m_next)
    p = jnp.exp2(s * fold - lax.broadcast_in_dim(m_next, s.shape, (0,)))
    return p, m_next, l_i * alpha + jnp.sum(p, 1), alpha


def recompute_probabilities(s_factors: tuple[Any, Any], dp_factors: tuple[Any, Any], loaded: tuple[Any, Any],
                            mask: Callable[[jax.Array], jax.Array], lse: Callable[[], jax.Array], fold: float,
                            spill: tuple | None) -> tuple[jax.Array, jax.Array]:
    """(P, dP) of one step of the backward pass, fp32, where P = 2^(fold S - lse) from the unscaled scores S.

    s_factors, dp_factors: the references a and b of S = a bᵀ and of dP = a bᵀ; loaded: for each product the barrier of
    its streamed factor; mask: hides scores; lse: the log-sum-exp, in the shape of S.
    """
    def multiply(s_acc: Any, dp_acc: Any) -> tuple[jax.Array, jax.Array]:
        plgpu.barrier_wait(loaded[0])
        product_transposed(s_acc, *s_factors, spill)
        plgpu.barrier_wait(loaded[1])
        product_transposed(dp_acc, *dp_factors, spill)
        s = mask(plgpu.wgmma_accumulator_load(s_acc, wait_n=1))  # dP is still being multiplied
        return jnp.exp2(s * fold - lse()), dp_acc[...]

    scores = plgpu.ACC((s_factors[0].shape[0], s_factors[1].shape[0]), FLOATS)
    return pl.run_scoped(multiply, scores, scores)


def stream(steps: jax.Array, released: tuple, fetch: Callable[[jax.Array, jax.Array, int], None]) -> None:
    """Producer loop: loads step t into slot t % stages as soon as that slot's previous contents have been used, and
    returns after the last use.

    released: for each operand an array of barriers, one per stage. fetch(t, slot, operand) starts the copies of one
    operand.
    """
    stages = released[0].shape[0]

    def step(t: jax.Array, _: None) -> None:
        slot = lax.rem(t, stages)
        for operand, barrier in enumerate(released):
            pl.when(t >= stages)(functools.partial(plgpu.barrier_wait, barrier.at[slot]))
            pl.when(t < steps)(functools.partial(fetch, t, slot, operand))

    lax.fori_loop(0, steps + stages, step, None)


def keys_and_values(k: Any, v: Any, heads: int, head: jax.Array, batch: jax.Array) -> tuple[Any, Any]:
    """References [K, d] to the keys and the values that one of `heads` query heads reads, from k and v [batch, K,
    kv_heads, d]."""
    of_k, of_v = (x.at[batch, :, lax.div(head, heads // k.shape[2])] for x in (k, v))
    return of_k, of_v


def stream_keys(visits: Any, steps: jax.Array, kv: tuple, kv_smem: tuple, loaded: tuple, released: tuple,
                regions: int) -> None:
    """`stream` of the tiles of keys and values on one work list.

    visits: int32 [2 + visits], a list of `gpu.pack_visits`, of which the first `steps` are executed.
    For keys and values each: kv, a reference [K, d] in device memory; kv_smem, one [STAGES, TILE, d] in shared memory;
    loaded and released, arrays of barriers, one per stage.
    """
    def fetch(t: jax.Array, slot: jax.Array, operand: int) -> None:
        tile, _, _ = decode_visit(visits[2 + t], regions)
        keys = pl.ds(tile * TILE, TILE)
        plgpu.copy_gmem_to_smem(kv[operand].at[keys], kv_smem[operand].at[slot], loaded[operand].at[slot])

    stream(steps, released, fetch)


def stream_queries(steps: jax.Array, decode: Callable[[jax.Array], tuple], batch: jax.Array, queries: QueryArrays,
                   smem: QueryArrays, loaded: tuple, released: tuple) -> None:
    """`stream` of the queries of `d_keys_kernel`, as two operands: q with lse and rows, and d_o with delta.

    decode: `decode_step` as a function of the step alone; queries: whole arrays in device memory; smem: one slot per
    stage in shared memory; loaded, released: for each operand an array of barriers, one per stage.
    """
    def fetch(t: jax.Array, slot: jax.Array, operand: int) -> None:
        head, first_query, _, _ = decode(t)
        span = pl.ds(first_query, ROWS)
        pairs = (((queries.q.at[batch, span, head], smem.q), (queries.lse.at[batch, head, span], smem.lse),
                  (queries.rows.at[batch_index(queries.rows, batch), :, span], smem.rows)),
                 ((queries.d_o.at[batch, span, head], smem.d_o), (queries.delta.at[batch, head, span], smem.delta)))
        for source, target in pairs[operand]:
            plgpu.copy_gmem_to_smem(source, target.at[slot], loaded[operand].at[slot])

    stream(steps, released, fetch)


def load_tile(first: jax.Array, tile_loaded: Any, pairs: tuple) -> None:
    """The tile of rows from row `first` on, each half into the memory of its own warpgroup.

    pairs: for each array a function from a slice of rows to its reference in device memory, and a reference [2, ...] in
    shared memory. tile_loaded: the barrier on which all copies arrive.
    """
    for half in range(2):
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source(pl.ds(first + half * ROWS, ROWS)), target.at[half], tile_loaded)


def store(value: jax.Array, staging: Any, out: Any) -> None:
    """Copies a value from registers to device memory.

    staging: a reference in shared memory of the value's shape; out: one in device memory. The value is cast to the
    dtype of `staging`. The copy is asynchronous: `plgpu.wait_smem_to_gmem` waits for it.
    """
    staging[...] = value.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)
