"""A rule laid over a batch: what every layer's attention needs of it, made once a step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from dlm_jax.attention.rules import Annealed, Edges, Rows, Rule, edge_open
from dlm_jax.attention.tiles import tile_ranges


@struct.dataclass
class Plan:
    """Who sees whom, by rows: in region r, query i of sequence b sees the keys lo[b, r, i] .. hi[b, r, i] - 1.

    All arrays lead with the batch, or with 1 where every sequence has the same mask.

    lo, hi: int32 [batch or 1, regions, Q], numpy where the rule is static; edges: which of those keys are open, where
    not all are; tiles: `tile_ranges` of it; rule: the rule itself, where it is static and every token is a query;
    documents: whether segments cut the rows into documents.
    """

    lo: Any
    hi: Any
    tiles: Any
    edges: Edges | None
    rule: Rule | None = struct.field(pytree_node=False)
    documents: bool = struct.field(pytree_node=False)

    def visible(self, key: Any) -> jax.Array:
        """Which of the keys (indices, int32 [K]) each query sees: bool [batch or 1, Q, K]."""
        mask = jnp.any((self.lo[..., None] <= key) & (key < self.hi[..., None]), -3)
        if self.edges is None:
            return mask
        opens = edge_open(self.edges.row[..., None], key, self.edges.threshold[..., None])
        return mask & ((key < self.edges.sure[..., None]) | opens)

    def queries(self, start: int, end: int) -> "Plan":
        """The plan of some of the queries (without tiles, which do not divide)."""
        edges = self.edges
        if edges is not None:
            edges = Edges(edges.sure[..., start:end], edges.row[..., start:end], edges.threshold)
        return Plan(self.lo[..., start:end], self.hi[..., start:end], None, edges, None, self.documents)


def prepare(rule: Rule | Plan, keys: int, segments: jax.Array | None = None, queries: int | None = None,
            first: jax.Array | int = 0) -> Plan:
    """The plan of `rule` with documents kept apart.

    `segments` int [batch, keys] are document numbers; 0 is padding, which nobody sees and which sees nobody. The
    queries are the keys' own tokens `first .. first + queries` (all of them unless told otherwise); `first` is one
    number, or int [batch].
    """
    if isinstance(rule, Plan):
        return rule
    rows = document_rows(rule, keys, segments)
    if queries not in (None, keys):
        places = jnp.atleast_1d(jnp.asarray(first))[:, None] + np.arange(queries)

        def part(x: Any) -> jax.Array:
            return jnp.take_along_axis(jnp.asarray(x), places, axis=1, mode="clip")

        rows, segments = jax.tree.map(part, rows), None if segments is None else part(segments)
    xp = rows.index.__array_namespace__()
    lo, hi = (xp.stack(ends, 1) for ends in zip(*rule.intervals(rows)))
    seen = hi > lo if segments is None else (hi > lo) & (segments > 0)[:, None]
    lo, hi = (xp.where(seen, x, 0).astype("int32") for x in (lo, hi))
    edges = rule.edges(rows) if isinstance(rule, Annealed) else None
    static = queries in (None, keys) and not jax.tree.leaves(rule)
    return Plan(lo, hi, tile_ranges(lo, hi, edges, keys), edges, rule if static else None, segments is not None)


def visible_pairs(rule: Rule, length: int, segments: jax.Array | None = None) -> jax.Array:
    """How many (query, key) pairs see each other, exactly, without a mask: int64 [batch or 1]; of `Annealed` its
    expectation. Attention costs 4 head_dim heads floating-point operations a pair forward, and 10 backward."""
    plan = prepare(rule, length, segments)
    pairs = (plan.hi - plan.lo).sum((1, 2))
    if plan.edges is None:
        return pairs
    sure = jnp.clip(plan.edges.sure - plan.lo[:, 0], 0).sum(1)
    return sure + (pairs - sure) * (plan.edges.threshold[:, 0] * 2.0**-24)


def dense_mask(rule: Rule, keys: int, segments: jax.Array | None = None, queries: int | None = None,
               first: jax.Array | int = 0) -> jax.Array:
    """The mask of `rule`, to be looked at: bool [batch or 1, Q, keys]. Arguments as of `prepare`."""
    return prepare(rule, keys, segments, queries, first).visible(np.arange(keys))


def document_rows(rule: Rule, length: int, segments: jax.Array | None = None) -> Rows:
    """The rows of an input of `length` tokens: int32 [batch or 1, length].

    A document is a run of equal `segments` [batch, length]; the two halves of a two-stream input are runs of their own.
    """
    half = rule.half(length)
    index = np.arange(length, dtype=np.int32)[None]
    if segments is None:
        return Rows(index, index // half * half, index // half * half + half)
    changes = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    first = changes | (index % half == 0)
    start = jax.lax.cummax(jnp.where(first, index, 0), axis=1)
    following = jnp.pad(first[:, 1:], ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(following, index + 1, length), axis=1, reverse=True)
    return Rows(index + jnp.zeros_like(start), start, end)  # a sum, so that it lies where the segments lie in a mesh


def document_positions(rule: Rule, length: int, segments: jax.Array | None = None) -> Any:
    """Position of each token inside its document: int32 [batch or 1, length]. See `document_rows`."""
    rows = document_rows(rule, length, segments)
    return rows.index - rows.start
