"""A rule applied to one batch: what the attention of every layer needs of it, computed once per step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax import struct
from dlm_jax.attention.rules import Annealed, RandomEdges, Rule, edge_open
from dlm_jax.attention.tiles import tile_ranges
from dlm_jax.segments import Documents, find_documents
from dlm_jax.typing import Array, Bool, Float, Int, Int32, shape_checked


@struct.dataclass
class Plan:
    """Which keys each query of a batch sees, and which tiles a kernel visits. Splash attention calls this a `MaskInfo`,
    FlexAttention a `BlockMask`.

    In region r, query i of sequence b sees the keys lo[b, r, i] .. hi[b, r, i] - 1. The batch axis is 1 where every
    sequence has the same mask. The arrays are numpy where the rule is static.
    """

    lo: Int32[Array, "b regions Q"]  # first visible key
    hi: Int32[Array, "b regions Q"]  # one past the last visible key
    tiles: Int32[Array, "b regions tiles 4"] | None  # `tile_ranges` of lo and hi; None in a plan of selected queries
    edges: RandomEdges | None  # which keys of the intervals are open; None: all of them
    # The rule itself, where it is static and every token is a query; else None.
    rule: Rule | None = struct.field(pytree_node=False)
    has_documents: bool = struct.field(pytree_node=False)  # whether segments divide the sequences into documents
    # Whether the queries are split over devices, in the order of `parallel.context`; their keys then are too.
    split: bool = struct.field(pytree_node=False, default=False)

    def visible(self, key: Int32[Array, " K"]) -> Bool[jax.Array, "b Q K"]:
        """Which of the keys, given by index, each query sees; the batch may be 1."""
        mask = jnp.any((self.lo[..., None] <= key) & (key < self.hi[..., None]), -3)
        if self.edges is None:
            return mask
        opens = edge_open(self.edges.query_hash[..., None], key, self.edges.threshold[..., None])
        return mask & ((key < self.edges.always_visible_end[..., None]) | opens)

    def select_queries(self, start: int, end: int) -> "Plan":
        """The plan of the queries start .. end - 1, without tiles, since these do not split at any query."""
        edges = self.edges
        if edges is not None:
            edges = RandomEdges(edges.always_visible_end[..., start:end], edges.query_hash[..., start:end],
                                edges.threshold)
        return Plan(self.lo[..., start:end], self.hi[..., start:end], None, edges, None, self.has_documents)


@shape_checked
def make_plan(rule: Rule | Plan, keys: int, segments: Int[Array, "b K"] | None = None, queries: int | None = None,
              first: Int[Array, " b"] | Int[Array, ""] | int = 0, documents: Documents | None = None) -> Plan:
    """The plan of `rule` for `keys` tokens, with documents kept apart. A `Plan` is returned unchanged.

    segments: the document number of each key; 0 is padding, which sees nothing and is seen by nothing.
    queries: how many of the keys' own tokens are queries, from token `first` on (default: all).
    first: one index, or one per sequence.
    documents: those of the keys, where the caller has already found them.
    """
    if isinstance(rule, Plan):
        return rule
    of_queries = documents or find_documents(keys, segments, rule.stream_length(keys))
    if queries not in (None, keys):
        index = jnp.atleast_1d(jnp.asarray(first))[:, None] + np.arange(queries)

        def take_queries(x: Array) -> jax.Array:
            return jnp.take_along_axis(jnp.asarray(x), index, axis=1, mode="clip")

        of_queries = jax.tree.map(take_queries, of_queries)
        segments = None if segments is None else take_queries(segments)
    xp = of_queries.index.__array_namespace__()
    lo, hi = (xp.stack(ends, 1) for ends in zip(*rule.intervals(of_queries)))
    nonempty = hi > lo if segments is None else (hi > lo) & (segments > 0)[:, None]
    lo, hi = (xp.where(nonempty, x, 0).astype("int32") for x in (lo, hi))
    edges = rule.edges(of_queries) if isinstance(rule, Annealed) else None
    static = queries in (None, keys) and not jax.tree.leaves(rule)
    return Plan(lo, hi, tile_ranges(lo, hi, edges, keys), edges, rule if static else None, segments is not None)


def split_plan(plan: Plan) -> Plan:
    """The plan, made for queries in the order of `parallel.context.deal`, of which each device has its own."""
    return dataclasses.replace(plan, tiles=None, rule=None, split=True)


def own_tiles(plan: Plan, keys: int) -> Plan:
    """A device's part of a split plan, with its tiles."""
    return dataclasses.replace(plan, tiles=tile_ranges(plan.lo, plan.hi, plan.edges, keys), split=False)


@shape_checked
def plan_intervals(lo: Int[Array, "b regions Q"], hi: Int[Array, "b regions Q"], keys: int) -> Plan:
    """The plan of queries that see the keys lo .. hi - 1 of each region, of `keys` keys; none where lo = hi."""
    lo, hi = (jnp.where(hi > lo, x, 0).astype(jnp.int32) for x in (lo, hi))
    return Plan(lo, hi, tile_ranges(lo, hi, None, keys), edges=None, rule=None, has_documents=True)


@shape_checked
def visible_pairs(rule: Rule, length: int,
                  segments: Int[Array, "b K"] | None = None) -> Int[Array, " batch"] | Float[Array, " batch"]:
    """How many (query, key) pairs are visible in each sequence (one count where all have the same mask), exactly and
    without a mask; for `Annealed` the expectation.

    Attention costs 4 head_dim heads floating-point operations per pair forward, and 10 head_dim heads backward.
    """
    plan = make_plan(rule, length, segments)
    pairs = (plan.hi - plan.lo).sum((1, 2))
    if plan.edges is None:
        return pairs
    always_visible = jnp.clip(plan.edges.always_visible_end - plan.lo[:, 0], 0).sum(1)
    return always_visible + (pairs - always_visible) * (plan.edges.threshold[:, 0] * 2.0**-24)


@shape_checked
def dense_mask(rule: Rule, keys: int, segments: Int[Array, "b K"] | None = None, queries: int | None = None,
               first: Int[Array, " b"] | Int[Array, ""] | int = 0) -> Bool[Array, "batch Q K"]:
    """The mask of `rule` written out, for inspection; its batch is 1 where all sequences have the same mask. Arguments
    as for `make_plan`."""
    return make_plan(rule, keys, segments, queries, first).visible(np.arange(keys))
