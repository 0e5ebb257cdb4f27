"""Which tiles of the (query, key) plane hold visible pairs, computed from the intervals of the queries."""

import functools
from typing import Any

import numpy as np

from dlm_jax.attention.rules import RandomEdges, Rule
from dlm_jax.segments import Documents
from dlm_jax.typing import Array, Int32, shape_checked

TILE = 128  # queries and keys per tile: the lanes of a TPU, and the rows of a pair of Hopper warpgroups

KvRuns = tuple[tuple[int, int], ...]  # half-open runs of keys


@shape_checked
def tile_ranges(lo: Int32[Array, "b regions Q"], hi: Int32[Array, "b regions Q"], edges: RandomEdges | None,
                keys: int) -> Int32[Array, "b regions tiles 4"]:
    """For each region and each tile of queries, the tiles of keys to visit, and which of these are full.

    lo, hi: the intervals, numpy or JAX; (0, 0) where a query sees nothing. The batch may be 1.
    Returns four bounds per region and tile of queries, in tiles of keys (first, full, full_end, end): visit the tiles
    first .. end - 1; of these, full .. full_end - 1 need no mask. All four are 0 if there is nothing to visit, and the
    inner two are equal if no tile is full. Padding rows are ignored.
    """
    xp = lo.__array_namespace__()
    always_visible_end = hi if edges is None else xp.minimum(hi, edges.always_visible_end[:, None])
    padding = -lo.shape[-1] % TILE

    def over_rows(reduce: Any, x: Any, neutral: int) -> Any:
        padded = xp.pad(x, ((0, 0), (0, 0), (0, padding)), constant_values=neutral)
        return reduce(padded.reshape(*lo.shape[:-1], -1, TILE), axis=-1)

    first = over_rows(xp.min, xp.where(hi > lo, lo, keys), keys) // TILE
    end = -(-over_rows(xp.max, hi, 0) // TILE)
    # A query that sees nothing leaves no tile full: its interval ends at 0.
    full = -(-over_rows(xp.max, lo, 0) // TILE)
    full_end = xp.maximum(over_rows(xp.min, always_visible_end, keys) // TILE, full)
    first = xp.minimum(first, end)
    return xp.stack([first, xp.clip(full, first, end), xp.clip(full_end, first, end), end], -1).astype("int32")


@shape_checked
def coarsen(bounds: Int32[Array, "*b tiles 4"], times: int) -> Int32[Array, "*b coarse_tiles 4"]:
    """The bounds of `tile_ranges` for tiles of `times` x TILE queries; the last one may have fewer."""
    xp, huge = bounds.__array_namespace__(), 2**30
    tiles = -(-bounds.shape[-2] // times)
    first, full, full_end, end = (bounds[..., i] for i in range(4))

    def over_tiles(reduce: Any, x: Any, neutral: int) -> Any:
        padding = [(0, 0)] * (x.ndim - 1) + [(0, tiles * times - x.shape[-1])]
        padded = xp.pad(x, padding, constant_values=neutral)
        return reduce(padded.reshape(*x.shape[:-1], tiles, times), axis=-1)

    end, first = over_tiles(xp.max, end, 0), over_tiles(xp.min, xp.where(end > first, first, huge), huge)
    full, full_end = over_tiles(xp.max, full, 0), over_tiles(xp.min, full_end, huge)
    first = xp.minimum(first, end)
    return xp.stack([first, xp.clip(full, first, end), xp.clip(xp.maximum(full, full_end), first, end), end], -1)


@functools.lru_cache(maxsize=64)
def static_kv_runs(rule: Rule, length: int, chunk: int) -> tuple[KvRuns, ...]:
    """For each `chunk` of queries, the runs of keys that it can see, however the sequence is divided into documents.

    `rule` must be static (no traced parameter). The runs of a chunk are disjoint, sorted, and not aligned to tiles.
    """
    stream, block = rule.stream_length(length), rule.block
    index = np.arange(length, dtype=np.int32)[:, None]
    origin = index // stream * stream
    # Where a document starts shifts its blocks. The starts within two blocks cover every shift, with a block before it.
    starts = np.concatenate([origin, np.maximum(index - np.arange(2 * block, dtype=np.int32), origin)], 1)
    index = np.broadcast_to(index, starts.shape)
    intervals = rule.intervals(Documents(index, starts, np.broadcast_to(origin + stream, starts.shape)))
    return tuple(_union([_hull(lo[a:a + chunk], hi[a:a + chunk]) for lo, hi in intervals])
                 for a in range(0, length, chunk))


def _hull(lo: Any, hi: Any) -> tuple[int, int]:
    """The smallest interval that contains all non-empty ones; (0, 0) if there are none."""
    nonempty = hi > lo
    return (int(lo[nonempty].min()), int(hi[nonempty].max())) if nonempty.any() else (0, 0)


def _union(runs: list[tuple[int, int]]) -> KvRuns:
    """The non-empty runs, merged where they touch."""
    merged: list[tuple[int, int]] = []
    for lo, hi in sorted(run for run in runs if run[1] > run[0]):
        if merged and lo <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(hi, merged[-1][1])
        else:
            merged.append((lo, hi))
    return tuple(merged)
