"""What the Hopper kernels (`dlm_jax.attention.gpu_kernels`) are made of: loading, masking, multiplying, storing."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from dlm_jax.attention.rules import edge_open
from dlm_jax.attention.tiles import TILE

ROWS = 64  # of a tile, for each of the two warpgroups; also the queries of a step of `d_keys`
LOADER = 2  # the number of the warpgroup that loads
STAGES = 2  # all that shared memory holds of keys and values of 128 dimensions, beside the queries
SHORT_STAGES = 4  # of `d_keys`, whose steps are shorter
LEAST = -1e30  # below every score, and finite, so that differences of it are numbers
NOBODY = 1e30  # the log-sum-exp of a row that sees nothing: 2^(s - NOBODY) = 0
FLOATS = jnp.float32


def visit(code: jax.Array, regions: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What a visit's code says: the other tile, the region, and whether something in it is hidden."""
    return lax.div(code, 2 * regions), lax.rem(lax.div(code, 2), regions), lax.rem(code, 2) > 0


def of_batch(x: Any, batch: jax.Array) -> Any:
    """The index of a sequence in an array that leads with the batch or with 1."""
    return batch if x.shape[0] > 1 else 0


def product(acc: Any, a: Any, b: Any, spill: Any) -> None:
    """acc += a b, where a is in registers and b a ref.

    spill: None, or a pair of refs with room for a left factor and a transposed right one: interpreters, unlike the
    hardware, multiply only what lies in memory, and the one of jax 0.10 only as it lies.
    """
    if spill is not None:
        spill[0][...] = a
        plgpu.commit_smem()
        a = spill[0]
    plgpu.wgmma(acc, a, b)


def product_transposed(acc: Any, a: Any, b: Any, spill: Any) -> None:
    """acc += a bᵀ, of refs; `spill` as in `product`."""
    if spill is not None:
        spill[1][...] = b[...].T
        plgpu.commit_smem()
    plgpu.wgmma(acc, a, b.transpose((1, 0)) if spill is None else spill[1])


def hide(s: jax.Array, partial: jax.Array, rows: Any, region: jax.Array, key: jax.Array, axis: int,
         edges: bool) -> jax.Array:
    """Scores with -inf where the query does not see the key; as they are unless `partial`.

    rows: a ref int32 [channels, queries], the channels as `dlm_jax.attention.gpu.row_channels` gives them; key: int32,
    the first key of `s`; axis: which axis of `s` is the queries.
    """
    def over(row: jax.Array) -> jax.Array:
        return lax.broadcast_in_dim(row, s.shape, (axis,))

    def hidden(s: jax.Array) -> jax.Array:
        index = lax.broadcasted_iota(jnp.int32, s.shape, 1 - axis)
        lo, hi = rows[2 * region], rows[2 * region + 1]
        seen = (index - over(lo - key)).astype(jnp.uint32) < over((hi - lo).astype(jnp.uint32))  # below lo it wraps
        if edges:
            keys = key + index
            sure, hashed, threshold = (over(rows[rows.shape[0] - 3 + i]) for i in range(3))
            seen &= (keys < sure) | edge_open(hashed, keys, threshold)
        return jnp.where(seen, s, -jnp.inf)

    return lax.cond(partial, hidden, lambda s: s, s)


def stream(steps: jax.Array, released: tuple, fetch: Callable) -> None:
    """The loader's life: step t into slot t % stages as soon as what was there is used, and to the end of the last use.

    released: for each operand an array of a barrier a stage; fetch(t, slot, operand): starts the copies of one.
    """
    stages = released[0].shape[0]

    def step(t: jax.Array, _: None) -> None:
        slot = lax.rem(t, stages)
        for operand, barrier in enumerate(released):
            pl.when(t >= stages)(functools.partial(plgpu.barrier_wait, barrier.at[slot]))
            pl.when(t < steps)(functools.partial(fetch, t, slot, operand))

    lax.fori_loop(0, steps + stages, step, None)


def stream_keys(steps: jax.Array, tile: Callable, sources: tuple, targets: tuple, loaded: tuple,
                released: tuple) -> None:
    """`stream` of keys and values: of step t the tile `tile(t)`, from refs [keys, d] to refs [STAGES, TILE, d]."""
    def fetch(t: jax.Array, slot: jax.Array, operand: int) -> None:
        keys = pl.ds(tile(t) * TILE, TILE)
        plgpu.copy_gmem_to_smem(sources[operand].at[keys], targets[operand].at[slot], loaded[operand].at[slot])

    stream(steps, released, fetch)


def load_tile(first: jax.Array, start: Any, pairs: tuple) -> None:
    """The tile from row `first`, its halves to where their warpgroups find them.

    pairs: a function from rows to a ref of them in device memory, and a ref [2, ...] in shared memory.
    """
    for half in range(2):
        for source, target in pairs:
            plgpu.copy_gmem_to_smem(source(pl.ds(first + half * ROWS, ROWS)), target.at[half], start)


def store(value: jax.Array, staging: Any, out: Any) -> None:
    """A value from registers through shared memory to device memory."""
    staging[...] = value.astype(staging.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(staging, out)
