"""Which tiles of the (query, key) plane hold visible pairs, from the intervals of the rows."""

import functools
from typing import Any

import numpy as np

from dlm_jax.attention.rules import Edges, Rows, Rule

TILE = 128  # queries and keys of a tile: the width of a TPU's lanes, and of a Hopper warpgroup pair's rows

Runs = tuple[tuple[int, int], ...]  # half-open runs of keys


def tile_ranges(lo: Any, hi: Any, edges: Edges | None, keys: int) -> Any:
    """For each region and each TILE of queries: the tiles of keys that hold something visible, and those that hold
    nothing hidden.

    lo, hi: int32 [batch or 1, regions, Q], numpy or JAX; both empty (0, 0) where a row sees nothing.
    Returns int32 [batch or 1, regions, ceil(Q / TILE), 4], four bounds in tiles of keys (first, full, full_end, end):
    the tiles first .. end - 1 are to be visited, and of them full .. full_end - 1 need no mask. With nothing to visit
    all four are 0; with nothing full the two inner ones are equal. Rows beyond Q are nobody's, and do not count.
    """
    xp = lo.__array_namespace__()
    certain = hi if edges is None else xp.minimum(hi, edges.sure[:, None])
    rest = -lo.shape[-1] % TILE

    def over_rows(reduce: Any, x: Any, nobody: int) -> Any:
        padded = xp.pad(x, ((0, 0), (0, 0), (0, rest)), constant_values=nobody)
        return reduce(padded.reshape(*lo.shape[:-1], -1, TILE), axis=-1)

    first = over_rows(xp.min, xp.where(hi > lo, lo, keys), keys) // TILE
    end = -(-over_rows(xp.max, hi, 0) // TILE)
    # A row that sees nothing leaves no tile full: its interval ends at 0.
    full = -(-over_rows(xp.max, lo, 0) // TILE)
    full_end = xp.maximum(over_rows(xp.min, certain, keys) // TILE, full)
    first = xp.minimum(first, end)
    return xp.stack([first, xp.clip(full, first, end), xp.clip(full_end, first, end), end], -1).astype("int32")


def coarser(bounds: Any, times: int) -> Any:
    """`tile_ranges` for tiles of `times` x TILE queries: int32 [..., ceil(tiles / times), 4]."""
    xp, huge = bounds.__array_namespace__(), 2**30
    tiles = -(-bounds.shape[-2] // times)
    first, full, full_end, end = (bounds[..., i] for i in range(4))

    def over_tiles(reduce: Any, x: Any, nobody: int) -> Any:
        rest = [(0, 0)] * (x.ndim - 1) + [(0, tiles * times - x.shape[-1])]
        padded = xp.pad(x, rest, constant_values=nobody)
        return reduce(padded.reshape(*x.shape[:-1], tiles, times), axis=-1)

    end, first = over_tiles(xp.max, end, 0), over_tiles(xp.min, xp.where(end > first, first, huge), huge)
    full, full_end = over_tiles(xp.max, full, 0), over_tiles(xp.min, full_end, huge)
    first = xp.minimum(first, end)
    return xp.stack([first, xp.clip(full, first, end), xp.clip(xp.maximum(full, full_end), first, end), end], -1)


@functools.lru_cache(maxsize=64)
def reach(rule: Rule, length: int, chunk: int) -> tuple[Runs, ...]:
    """For each `chunk` of queries, the runs of keys that it can see however the row is cut into documents.

    `rule` must be static (no traced parameter). The runs of a chunk are disjoint, in order, and aligned to nothing.
    """
    half, block = rule.half(length), getattr(rule, "block", 1)
    index = np.arange(length, dtype=np.int32)[:, None]
    origin = index // half * half
    # Where a document starts shifts its blocks; the starts within two blocks show all shifts, with a block before.
    starts = np.concatenate([origin, np.maximum(index - np.arange(2 * block, dtype=np.int32), origin)], 1)
    index = np.broadcast_to(index, starts.shape)
    intervals = rule.intervals(Rows(index, starts, np.broadcast_to(origin + half, starts.shape)))
    return tuple(_union([_hull(lo[a:a + chunk], hi[a:a + chunk]) for lo, hi in intervals])
                 for a in range(0, length, chunk))


def _hull(lo: np.ndarray, hi: np.ndarray) -> tuple[int, int]:
    """The smallest interval around the non-empty ones."""
    seen = hi > lo
    return (int(lo[seen].min()), int(hi[seen].max())) if seen.any() else (0, 0)


def _union(runs: list[tuple[int, int]]) -> Runs:
    """Non-empty runs, joined where they touch."""
    joined: list[tuple[int, int]] = []
    for lo, hi in sorted(run for run in runs if run[1] > run[0]):
        if joined and lo <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(hi, joined[-1][1])
        else:
            joined.append((lo, hi))
    return tuple(joined)
