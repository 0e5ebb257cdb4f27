"""Mosaic GPU kernels for Hopper (sm_90a): the forward pass, and the two halves of the backward pass.

A block of threads is two warpgroups that compute, each on 64 rows of a tile of 128, and one that loads: it follows the
block's list of visits (`dlm_jax.attention.gpu.pack_visits`) and stays up to STAGES of them ahead of the others, in
shared memory. Copies go through the tensor memory accelerator and complete on a barrier. Matrix products are `wgmma`,
accumulated in registers.

Letters: S = scale q kᵀ, P = softmax(S), O = P v; D = rowsum(O dO); dP = dO vᵀ, dS = P (dP - D), dV = Pᵀ dO,
dQ = scale dS k, dK = scale dSᵀ q (FlashAttention-2, arXiv 2307.08691; the two warpgroups taking turns on the tensor
cores is FlashAttention-3, arXiv 2407.08608). m_i, l_i, alpha and acc as in FlashAttention. Exponents are in base 2:
`fold` is scale log2(e).

Arguments that all kernels share, in device memory: q [batch, Q, heads, d]; k, v [batch, K, kv_heads, d]; rows int32
[batch or 1, channels, Q], the channels of `gpu.row_channels`; work int32 [batch or 1, tiles, 2 + visits], the lists of
`gpu.pack_visits`. Then come the outputs, and then:

    smem: the references in shared memory, in the order that each kernel lists
    loaded: barriers that complete when something has arrived: (tile_loaded, then for each streamed operand one per
        stage), where tile_loaded is for what is loaded once
    released: for each streamed operand one barrier per stage, completed when both computing warpgroups have used it
    spill: only in interpreters, see `gpu_parts.product`; None on hardware
    regions, edges: number of regions of the plan, and whether its channels include random edges
    scale: 1 / sqrt(head_dim)
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dlm_jax.attention.gpu_parts import (
    EMPTY_LSE,
    FLOATS,
    LOG2_E,
    M_INIT,
    ROWS,
    SHORT_STAGES,
    STAGES,
    QueryArrays,
    batch_index,
    decode_step,
    decode_visit,
    keys_and_values,
    load_tile,
    mask_scores,
    online_softmax,
    own_spill,
    product,
    product_in_fp32,
    recompute_probabilities,
    scores_in_turn,
    split_roles,
    store,
    stream_keys,
    stream_queries,
    take_turns,
)
from dlm_jax.attention.tiles import TILE


def forward_kernel(q: Any, k: Any, v: Any, rows: Any, work: Any, o: Any, lse: Any, smem: tuple, loaded: tuple,
                   released: tuple, turn: Any, spill: tuple | None, *, regions: int, edges: bool,
                   scale: float) -> None:
    """O and the log-sum-exp of one tile of queries of one head, over the tiles of keys on its list.

    Inputs q, k, v, rows, work and the static arguments: see the module. Outputs: o as q; lse fp32 [batch, heads, Q], in
    base 2. smem: q [2, ROWS, d], k and v [STAGES, TILE, d], rows [2, channels, ROWS], lse [2, ROWS]. loaded:
    (tile_loaded, k, v), where tile_loaded is for q and rows. released: (k, v). turn: the barrier at which the computing
    warpgroups take turns.
    """
    head, batch, warpgroup = (lax.axis_index(name) for name in ("head", "batch", "wg"))
    visits = work.at[batch_index(work, batch), lax.axis_index("tile")]
    first, steps = visits[0] * TILE, visits[1]
    q_smem, k_smem, v_smem, rows_smem, lse_smem = smem
    tile_loaded, k_loaded, v_loaded = loaded
    k_used, v_used = released
    fold, spill = scale * LOG2_E, own_spill(spill, warpgroup)

    def load() -> None:
        pairs = ((lambda span: q.at[batch, span, head], q_smem),
                 (lambda span: rows.at[batch_index(rows, batch), :, span], rows_smem))
        load_tile(first, tile_loaded, pairs)
        kv = keys_and_values(k, v, q.shape[2], head, batch)
        stream_keys(visits, steps, kv, (k_smem, v_smem), (k_loaded, v_loaded), released, regions)

    def step(t: jax.Array, carry: tuple) -> tuple:
        acc, m_i, l_i = carry
        slot = lax.rem(t, STAGES)
        tile, region, partial = decode_visit(visits[2 + t], regions)
        plgpu.barrier_wait(k_loaded.at[slot])
        s = scores_in_turn(q_smem.at[warpgroup], k_smem.at[slot], turn, spill)
        plgpu.barrier_arrive(k_used.at[slot])
        s = mask_scores(s, partial, rows_smem.at[warpgroup], region, tile * TILE, 0, edges)
        p, m_i, l_i, alpha = online_softmax(s, m_i, l_i, fold)
        p = p.astype(q.dtype)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_loaded.at[slot])
        plgpu.barrier_wait(turn)
        pv = product_in_fp32(p, v_smem.at[slot], spill)
        plgpu.barrier_arrive(v_used.at[slot])
        return acc * lax.broadcast_in_dim(alpha, acc.shape, (0,)) + pv, m_i, l_i

    def compute() -> None:
        switch = functools.partial(take_turns, turn)
        pl.when(warpgroup == 1)(switch)
        zeros = jnp.zeros((ROWS,), FLOATS)
        acc, m_i, l_i = lax.fori_loop(0, steps, step, (jnp.zeros((ROWS, q.shape[3]), FLOATS), zeros + M_INIT, zeros))
        pl.when(warpgroup == 0)(switch)
        sees_something = l_i > 0  # hidden scores contribute exactly 0
        inverse = jnp.where(sees_something, 1 / jnp.where(sees_something, l_i, 1.0), 0.0)
        own_rows = pl.ds(first + warpgroup * ROWS, ROWS)
        store(acc * lax.broadcast_in_dim(inverse, acc.shape, (0,)), q_smem.at[warpgroup], o.at[batch, own_rows, head])
        log = m_i + jnp.log(jnp.where(sees_something, l_i, 1.0)) * LOG2_E
        store(jnp.where(sees_something, log, EMPTY_LSE), lse_smem.at[warpgroup], lse.at[batch, head, own_rows])
        plgpu.wait_smem_to_gmem(0)

    split_roles(warpgroup, tile_loaded, load, compute)


def d_queries_kernel(q: Any, k: Any, v: Any, d_o: Any, lse: Any, delta: Any, rows: Any, work: Any, dq: Any, smem: tuple,
                     loaded: tuple, released: tuple, spill: tuple | None, *, regions: int, edges: bool,
                     scale: float) -> None:
    """dQ of one tile of queries of one head, over the tiles of keys on its list.

    Inputs q, k, v, rows, work and the static arguments: see the module; d_o as q; lse (of `forward_kernel`) and delta
    (D) fp32 [batch, heads, Q]. Output: dq as q. smem: q and d_o [2, ROWS, d], k and v [STAGES, TILE, d], rows
    [2, channels, ROWS], lse and delta [2, ROWS]. loaded: (tile_loaded, k, v), where tile_loaded is for all but k and v.
    released: (k, v).
    """
    head, batch, warpgroup = (lax.axis_index(name) for name in ("head", "batch", "wg"))
    visits = work.at[batch_index(work, batch), lax.axis_index("tile")]
    first, steps = visits[0] * TILE, visits[1]
    q_smem, do_smem, k_smem, v_smem, rows_smem, lse_smem, delta_smem = smem
    tile_loaded, k_loaded, v_loaded = loaded
    k_used, v_used = released
    fold, spill = scale * LOG2_E, own_spill(spill, warpgroup)

    def load() -> None:
        pairs = ((lambda span: q.at[batch, span, head], q_smem),
                 (lambda span: d_o.at[batch, span, head], do_smem),
                 (lambda span: rows.at[batch_index(rows, batch), :, span], rows_smem),
                 (lambda span: lse.at[batch, head, span], lse_smem),
                 (lambda span: delta.at[batch, head, span], delta_smem))
        load_tile(first, tile_loaded, pairs)
        kv = keys_and_values(k, v, q.shape[2], head, batch)
        stream_keys(visits, steps, kv, (k_smem, v_smem), (k_loaded, v_loaded), released, regions)

    def accumulate(acc: Any) -> jax.Array:
        over = functools.partial(lax.broadcast_in_dim, shape=(ROWS, TILE), broadcast_dimensions=(0,))
        lse_rows, delta_rows = lse_smem[warpgroup], delta_smem[warpgroup]

        def step(t: jax.Array, _: None) -> None:
            slot = lax.rem(t, STAGES)
            tile, region, partial = decode_visit(visits[2 + t], regions)
            p, dp = recompute_probabilities(
                (q_smem.at[warpgroup], k_smem.at[slot]), (do_smem.at[warpgroup], v_smem.at[slot]),
                (k_loaded.at[slot], v_loaded.at[slot]),
                lambda s: mask_scores(s, partial, rows_smem.at[warpgroup], region, tile * TILE, 0, edges),
                lambda: over(lse_rows), fold, spill)
            plgpu.barrier_arrive(v_used.at[slot])
            ds = p * (dp - over(delta_rows))
            product(acc, ds.astype(q.dtype), k_smem.at[slot], spill)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_used.at[slot])

        lax.fori_loop(0, steps, step, None)
        return acc[...]

    def compute() -> None:
        acc = pl.run_scoped(accumulate, plgpu.ACC((ROWS, q.shape[3]), FLOATS))
        store(acc * scale, q_smem.at[warpgroup], dq.at[batch, pl.ds(first + warpgroup * ROWS, ROWS), head])
        plgpu.wait_smem_to_gmem(0)

    split_roles(warpgroup, tile_loaded, load, compute)


def d_keys_kernel(q: Any, k: Any, v: Any, d_o: Any, lse: Any, delta: Any, rows: Any, work: Any, dk: Any, dv: Any,
                  smem: tuple, loaded: tuple, released: tuple, spill: tuple | None, *, regions: int, edges: bool,
                  scale: float) -> None:
    """dK and dV of one tile of keys of one key-value head, over the tiles of queries on its list and all heads that
    read it. Scores are transposed: keys are the rows.

    A step is ROWS queries: dK, dV, Sᵀ and dPᵀ of a warpgroup then fit its registers.

    Inputs as in `d_queries_kernel`, but work has the lists of the tiles of keys. Outputs: dk and dv as k. smem: k and v
    [2, ROWS, d], q and d_o [SHORT_STAGES, ROWS, d], lse and delta [SHORT_STAGES, ROWS], rows [SHORT_STAGES, channels,
    ROWS]. loaded: (tile_loaded, q, d_o), where tile_loaded is for k and v, q also for lse and rows, and d_o also for
    delta. released: (q, d_o).
    """
    kv_head, batch, warpgroup = (lax.axis_index(name) for name in ("head", "batch", "wg"))
    visits = work.at[batch_index(work, batch), lax.axis_index("tile")]
    heads_per_kv_head = q.shape[2] // k.shape[2]
    first, steps_per_head = visits[0] * TILE, 2 * visits[1]
    steps = heads_per_kv_head * steps_per_head
    (k_smem, v_smem), in_smem = smem[:2], QueryArrays(*smem[2:])
    tile_loaded, q_loaded, do_loaded = loaded
    q_used, do_used = released
    fold, spill = scale * LOG2_E, own_spill(spill, warpgroup)
    decode = functools.partial(decode_step, visits, steps_per_head, kv_head, heads_per_kv_head, regions)

    def load() -> None:
        load_tile(first, tile_loaded, ((lambda span: k.at[batch, span, kv_head], k_smem),
                                 (lambda span: v.at[batch, span, kv_head], v_smem)))
        stream_queries(steps, decode, batch, QueryArrays(q, d_o, lse, delta, rows), in_smem, loaded[1:], released)

    def accumulate(dk_acc: Any, dv_acc: Any) -> tuple[jax.Array, jax.Array]:
        over = functools.partial(lax.broadcast_in_dim, shape=(ROWS, ROWS), broadcast_dimensions=(1,))

        def step(t: jax.Array, _: None) -> None:
            slot = lax.rem(t, SHORT_STAGES)
            region, partial = decode(t)[2:]
            p, dp = recompute_probabilities(
                (k_smem.at[warpgroup], in_smem.q.at[slot]), (v_smem.at[warpgroup], in_smem.d_o.at[slot]),
                (q_loaded.at[slot], do_loaded.at[slot]),
                lambda s: mask_scores(s, partial, in_smem.rows.at[slot], region, first + warpgroup * ROWS, 1, edges),
                lambda: over(in_smem.lse[slot]), fold, spill)
            ds = p * (dp - over(in_smem.delta[slot]))
            product(dv_acc, p.astype(q.dtype), in_smem.d_o.at[slot], spill)
            product(dk_acc, ds.astype(q.dtype), in_smem.q.at[slot], spill)
            plgpu.commit_smem()  # orders the threads' own reads before the copy engine overwrites what they read
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(do_used.at[slot])
            plgpu.barrier_arrive(q_used.at[slot])

        lax.fori_loop(0, steps, step, None)
        return dk_acc[...], dv_acc[...]

    def compute() -> None:
        shape = (ROWS, q.shape[3])
        dk_sum, dv_sum = pl.run_scoped(accumulate, plgpu.ACC(shape, FLOATS), plgpu.ACC(shape, FLOATS))
        own_rows = pl.ds(first + warpgroup * ROWS, ROWS)
        store(dk_sum * scale, k_smem.at[warpgroup], dk.at[batch, own_rows, kv_head])
        store(dv_sum, v_smem.at[warpgroup], dv.at[batch, own_rows, kv_head])
        plgpu.wait_smem_to_gmem(0)

    split_roles(warpgroup, tile_loaded, load, compute)
