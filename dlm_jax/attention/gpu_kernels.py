"""Mosaic GPU kernels for Hopper (sm_90a): the forward pass, and the two halves of the backward pass.

A block of threads is two warpgroups that compute, each 64 rows of a tile of 128, and one that loads: it follows the
block's list of visits (`dlm_jax.attention.gpu.visits`) and keeps STAGES of them in shared memory ahead of the others.
Copies go through the bulk tensor engine and complete on a barrier; products of matrices are `wgmma`, their sums in
registers.

Letters: S = scale q kᵀ, P = softmax(S), O = P v; D = rowsum(O dO); dP = dO vᵀ, dS = P (dP - D), dV = Pᵀ dO,
dQ = scale dS k, dK = scale dSᵀ q (FlashAttention-2, arXiv 2307.08691; the two warpgroups taking turns on the tensor
cores is FlashAttention-3, arXiv 2407.08608). Exponents are of base 2: `fold` is scale log2(e).
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dlm_jax.attention.gpu_parts import (
    FLOATS,
    LEAST,
    LOADER,
    NOBODY,
    ROWS,
    SHORT_STAGES,
    STAGES,
    hide,
    load_tile,
    of_batch,
    product,
    product_transposed,
    store,
    stream,
    stream_keys,
    visit,
)
from dlm_jax.attention.tiles import TILE


def forward(q: Any, k: Any, v: Any, rows: Any, work: Any, o: Any, lse: Any, smem: tuple, loaded: tuple, released: tuple,
            turn: Any, spill: Any, *, regions: int, edges: bool, scale: float) -> None:
    """One tile of queries of one head against all tiles of keys on its list.

    q, o: [batch, Q, heads, d]; k, v: [batch, K, kv_heads, d]; rows: int32 [batch or 1, channels, Q]; work: int32
    [batch or 1, tiles, 2 + visits]; lse: fp32 [batch, heads, Q], base 2.
    """
    head, batch, me = (lax.axis_index(name) for name in ("head", "batch", "wg"))
    mine = work.at[of_batch(work, batch), lax.axis_index("tile")]
    first, steps = mine[0] * TILE, mine[1]
    q_smem, k_smem, v_smem, rows_smem, lse_smem = smem
    start, k_loaded, v_loaded = loaded
    k_used, v_used = released
    fold, aside = scale * math.log2(math.e), spill and tuple(x.at[me] for x in spill)

    @pl.when(me == LOADER)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load_tile(first, start, ((lambda some: q.at[batch, some, head], q_smem),
                                 (lambda some: rows.at[of_batch(rows, batch), :, some], rows_smem)))
        sources = tuple(x.at[batch, :, lax.div(head, q.shape[2] // k.shape[2])] for x in (k, v))
        stream_keys(steps, lambda t: visit(mine[2 + t], regions)[0], sources, (k_smem, v_smem), (k_loaded, v_loaded),
                    released)

    def take_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    def step(t: jax.Array, carry: tuple) -> tuple:
        total, peak, weight = carry
        slot = lax.rem(t, STAGES)
        tile, region, partial = visit(mine[2 + t], regions)

        def scores(acc: Any) -> jax.Array:
            product_transposed(acc, q_smem.at[me], k_smem.at[slot], aside)
            take_turns()  # the other may multiply while this one works out its softmax
            return acc[...]

        plgpu.barrier_wait(k_loaded.at[slot])
        s = pl.run_scoped(scores, plgpu.ACC((ROWS, TILE), FLOATS))
        plgpu.barrier_arrive(k_used.at[slot])
        s = hide(s, partial, rows_smem.at[me], region, tile * TILE, 0, edges)
        new_peak = jnp.maximum(peak, jnp.max(s, 1) * fold)
        shrink = jnp.exp2(peak - new_peak)
        p = jnp.exp2(s * fold - lax.broadcast_in_dim(new_peak, s.shape, (0,)))
        weight = weight * shrink + jnp.sum(p, 1)
        p = p.astype(q.dtype)
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_loaded.at[slot])
        plgpu.barrier_wait(turn)

        def values(acc: Any) -> jax.Array:
            product(acc, p, v_smem.at[slot], aside)
            return acc[...]

        more = pl.run_scoped(values, plgpu.ACC(total.shape, FLOATS))
        plgpu.barrier_arrive(v_used.at[slot])
        return total * lax.broadcast_in_dim(shrink, total.shape, (0,)) + more, new_peak, weight

    @pl.when(me < LOADER)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(start)
        pl.when(me == 1)(take_turns)
        none = jnp.zeros((ROWS,), FLOATS)
        nothing = jnp.zeros((ROWS, q.shape[3]), FLOATS), none + LEAST, none
        total, peak, weight = lax.fori_loop(0, steps, step, nothing)
        pl.when(me == 0)(take_turns)
        seen = weight > 0  # hidden scores have weight exactly 0
        inverse = jnp.where(seen, 1 / jnp.where(seen, weight, 1.0), 0.0)
        some = pl.ds(first + me * ROWS, ROWS)
        store(total * lax.broadcast_in_dim(inverse, total.shape, (0,)), q_smem.at[me], o.at[batch, some, head])
        log = peak + jnp.log(jnp.where(seen, weight, 1.0)) * math.log2(math.e)
        store(jnp.where(seen, log, NOBODY), lse_smem.at[me], lse.at[batch, head, some])
        plgpu.wait_smem_to_gmem(0)


def d_queries(q: Any, k: Any, v: Any, d_o: Any, lse: Any, delta: Any, rows: Any, work: Any, dq: Any, smem: tuple,
              loaded: tuple, released: tuple, spill: Any, *, regions: int, edges: bool, scale: float) -> None:
    """dQ of one tile of queries of one head, over the tiles of keys on its list; shapes as in `forward`.

    d_o, dq: [batch, Q, heads, d]; lse, delta: fp32 [batch, heads, Q].
    """
    head, batch, me = (lax.axis_index(name) for name in ("head", "batch", "wg"))
    mine = work.at[of_batch(work, batch), lax.axis_index("tile")]
    first, steps = mine[0] * TILE, mine[1]
    q_smem, do_smem, k_smem, v_smem, rows_smem, lse_smem, delta_smem = smem
    start, k_loaded, v_loaded = loaded
    k_used, v_used = released
    fold, aside = scale * math.log2(math.e), spill and tuple(x.at[me] for x in spill)

    @pl.when(me == LOADER)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load_tile(first, start, ((lambda some: q.at[batch, some, head], q_smem),
                                 (lambda some: d_o.at[batch, some, head], do_smem),
                                 (lambda some: rows.at[of_batch(rows, batch), :, some], rows_smem),
                                 (lambda some: lse.at[batch, head, some], lse_smem),
                                 (lambda some: delta.at[batch, head, some], delta_smem)))
        sources = tuple(x.at[batch, :, lax.div(head, q.shape[2] // k.shape[2])] for x in (k, v))
        stream_keys(steps, lambda t: visit(mine[2 + t], regions)[0], sources, (k_smem, v_smem), (k_loaded, v_loaded),
                    released)

    def run(acc: Any) -> jax.Array:
        over = functools.partial(lax.broadcast_in_dim, shape=(ROWS, TILE), broadcast_dimensions=(0,))
        logs, deltas = lse_smem[me], delta_smem[me]

        def step(t: jax.Array, _: None) -> None:
            slot = lax.rem(t, STAGES)
            tile, region, partial = visit(mine[2 + t], regions)

            def scores(s: Any, dp: Any) -> tuple[jax.Array, jax.Array]:
                plgpu.barrier_wait(k_loaded.at[slot])
                product_transposed(s, q_smem.at[me], k_smem.at[slot], aside)
                plgpu.barrier_wait(v_loaded.at[slot])
                product_transposed(dp, do_smem.at[me], v_smem.at[slot], aside)
                ready = plgpu.wgmma_accumulator_load(s, wait_n=1)  # dP is still being multiplied
                ready = hide(ready, partial, rows_smem.at[me], region, tile * TILE, 0, edges)
                return jnp.exp2(ready * fold - over(logs)), dp[...]

            p, dp = pl.run_scoped(scores, plgpu.ACC((ROWS, TILE), FLOATS), plgpu.ACC((ROWS, TILE), FLOATS))
            plgpu.barrier_arrive(v_used.at[slot])
            ds = p * (dp - over(deltas))
            product(acc, ds.astype(q.dtype), k_smem.at[slot], aside)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(k_used.at[slot])

        lax.fori_loop(0, steps, step, None)
        return acc[...]

    @pl.when(me < LOADER)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(start)
        total = pl.run_scoped(run, plgpu.ACC((ROWS, q.shape[3]), FLOATS))
        store(total * scale, q_smem.at[me], dq.at[batch, pl.ds(first + me * ROWS, ROWS), head])
        plgpu.wait_smem_to_gmem(0)


def d_keys(q: Any, k: Any, v: Any, d_o: Any, lse: Any, delta: Any, rows: Any, work: Any, dk: Any, dv: Any, smem: tuple,
           loaded: tuple, released: tuple, spill: Any, *, regions: int, edges: bool, scale: float) -> None:
    """dK and dV of one tile of keys of one key-value head, over the tiles of queries on its list and all heads that
    read it; transposed, keys as rows. Shapes as in `d_queries`; dk, dv: [batch, K, kv_heads, d].

    A step is ROWS queries: dK, dV, Sᵀ and dPᵀ of a warpgroup then fit its registers.
    """
    kv_head, batch, me = (lax.axis_index(name) for name in ("head", "batch", "wg"))
    mine = work.at[of_batch(work, batch), lax.axis_index("tile")]
    group = q.shape[2] // k.shape[2]
    first, each = mine[0] * TILE, 2 * mine[1]  # each: steps for one head
    steps = group * each
    k_smem, v_smem, q_smem, do_smem, lse_smem, delta_smem, rows_smem = smem
    start, q_loaded, do_loaded = loaded
    q_used, do_used = released
    fold, aside = scale * math.log2(math.e), spill and tuple(x.at[me] for x in spill)

    def at(t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """Of a step: the head, the first query, the region, and whether something is hidden."""
        rest = lax.rem(t, each)
        tile, region, partial = visit(mine[2 + lax.div(rest, 2)], regions)
        return kv_head * group + lax.div(t, each), tile * TILE + lax.rem(rest, 2) * ROWS, region, partial

    @pl.when(me == LOADER)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")
        load_tile(first, start, ((lambda some: k.at[batch, some, kv_head], k_smem),
                                 (lambda some: v.at[batch, some, kv_head], v_smem)))

        def fetch(t: jax.Array, slot: jax.Array, operand: int) -> None:
            head, query = at(t)[:2]
            some = pl.ds(query, ROWS)
            if operand == 0:
                parts: Any = ((q.at[batch, some, head], q_smem), (lse.at[batch, head, some], lse_smem),
                              (rows.at[of_batch(rows, batch), :, some], rows_smem))
            else:
                parts = (d_o.at[batch, some, head], do_smem), (delta.at[batch, head, some], delta_smem)
            for source, target in parts:
                plgpu.copy_gmem_to_smem(source, target.at[slot], (q_loaded, do_loaded)[operand].at[slot])

        stream(steps, released, fetch)

    def run(dk_acc: Any, dv_acc: Any) -> tuple[jax.Array, jax.Array]:
        over = functools.partial(lax.broadcast_in_dim, shape=(ROWS, ROWS), broadcast_dimensions=(1,))

        def step(t: jax.Array, _: None) -> None:
            slot = lax.rem(t, SHORT_STAGES)
            region, partial = at(t)[2:]

            def scores(s: Any, dp: Any) -> tuple[jax.Array, jax.Array]:
                plgpu.barrier_wait(q_loaded.at[slot])
                product_transposed(s, k_smem.at[me], q_smem.at[slot], aside)
                plgpu.barrier_wait(do_loaded.at[slot])
                product_transposed(dp, v_smem.at[me], do_smem.at[slot], aside)
                ready = plgpu.wgmma_accumulator_load(s, wait_n=1)  # dP is still being multiplied
                ready = hide(ready, partial, rows_smem.at[slot], region, first + me * ROWS, 1, edges)
                return jnp.exp2(ready * fold - over(lse_smem[slot])), dp[...]

            p, dp = pl.run_scoped(scores, plgpu.ACC((ROWS, ROWS), FLOATS), plgpu.ACC((ROWS, ROWS), FLOATS))
            ds = p * (dp - over(delta_smem[slot]))
            product(dv_acc, p.astype(q.dtype), do_smem.at[slot], aside)
            product(dk_acc, ds.astype(q.dtype), q_smem.at[slot], aside)
            plgpu.commit_smem()  # what the threads read themselves is read before the copy engine overwrites it
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(do_used.at[slot])
            plgpu.barrier_arrive(q_used.at[slot])

        lax.fori_loop(0, steps, step, None)
        return dk_acc[...], dv_acc[...]

    @pl.when(me < LOADER)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        plgpu.barrier_wait(start)
        shape = (ROWS, q.shape[3])
        dk_total, dv_total = pl.run_scoped(run, plgpu.ACC(shape, FLOATS), plgpu.ACC(shape, FLOATS))
        some = pl.ds(first + me * ROWS, ROWS)
        store(dk_total * scale, k_smem.at[me], dk.at[batch, some, kv_head])
        store(dv_total, v_smem.at[me], dv.at[batch, some, kv_head])
        plgpu.wait_smem_to_gmem(0)
