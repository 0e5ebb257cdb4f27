"""Mask rules: who sees whom, as pure predicates over sites.

A site is a place in the stream: its index, and its position inside its document. Blocks are counted from the start of a
document, so a packed document is masked exactly as it would be alone.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class Site:
    """Integer arrays that broadcast against each other: queries [..., Q, 1], keys [..., 1, K]."""

    index: jax.Array
    position: jax.Array


class Rule(Protocol):
    """What every mask rule offers."""

    def visible(self, q: Site, k: Site) -> jax.Array:
        """Whether query `q` sees key `k`, both of one document: bool [..., Q, K]."""
        ...

    def local(self, index: jax.Array) -> jax.Array:
        """Index inside the stream's half (the index itself where there is one stream)."""
        ...


@struct.dataclass
class OneStream:
    """Base of the rules whose stream is the text itself."""

    def local(self, index: jax.Array) -> jax.Array:
        return index


@struct.dataclass
class Causal(OneStream):
    """A token sees itself and the past."""

    def visible(self, q: Site, k: Site) -> jax.Array:
        return k.index <= q.index


@struct.dataclass
class Bidirectional(OneStream):
    """A token sees its whole document."""

    def visible(self, q: Site, k: Site) -> jax.Array:
        return jnp.broadcast_to(True, jnp.broadcast_shapes(q.index.shape, k.index.shape))


@struct.dataclass
class BlockCausal(OneStream):
    """A token sees its own block and all earlier blocks."""

    block: int = struct.field(pytree_node=False)

    def visible(self, q: Site, k: Site) -> jax.Array:
        return k.position // self.block <= q.position // self.block


@struct.dataclass
class BlockDiffusion:
    """Two streams [noisy || clean] of `length` tokens each (BD3-LM, arXiv 2503.09573; Efficient-DLM, 2512.14067).

    A noisy token sees the noisy tokens of its own block and the clean tokens of earlier blocks; a clean token sees the
    clean tokens of its own and earlier blocks; nothing clean sees anything noisy.
    """

    length: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)

    def local(self, index: jax.Array) -> jax.Array:
        return index % self.length

    def visible(self, q: Site, k: Site) -> jax.Array:
        q_clean, k_clean = q.index >= self.length, k.index >= self.length
        q_block, k_block = q.position // self.block, k.position // self.block
        from_noisy = jnp.where(k_clean, k_block < q_block, k_block == q_block)
        from_clean = k_clean & (k_block <= q_block)
        return jnp.where(q_clean, from_clean, from_noisy)


@struct.dataclass
class Annealed(OneStream):
    """DiffuLLaMA's attention annealing (arXiv 2410.17891, section 3.2): the causal mask, and each future edge open with
    `probability`, drawn afresh for each `seed` and shared by batch, heads and layers.

    The draw is a counter hash of (seed, q, k), so that no L x L table of random numbers is needed to know an edge.
    """

    probability: jax.Array  # fp32 scalar in [0, 1]
    seed: jax.Array  # uint32 scalar

    def visible(self, q: Site, k: Site) -> jax.Array:
        edge = hash32(k.index ^ hash32(q.index ^ hash32(self.seed)))
        opens = (edge >> 8).astype(jnp.float32) * 2.0**-24 < self.probability  # 24 bits: exact in fp32
        return (k.index <= q.index) | opens


def hash32(x: jax.Array) -> jax.Array:
    """A bijective 32-bit integer hash with good avalanche (the constants are from C. Wellons's 'lowbias32')."""
    x = jnp.asarray(x).astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


@struct.dataclass
class Dense:
    """A rule already turned into its mask, bool [batch or 1, Q, K]: what the reference computes once for all layers."""

    mask: jax.Array


def document_positions(rule: Rule, length: int, segments: jax.Array | None = None) -> jax.Array:
    """Position of each token inside its document: int32 [length], or [batch, length] where there are segments.

    A document is a run of equal `segments` [batch, length]; the two halves of a two-stream input restart.
    """
    index = jnp.arange(length, dtype=jnp.int32)
    local = rule.local(index)
    if segments is None:
        return local
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    starts = jnp.where(same & (local > 0), 0, index)
    return index - jax.lax.cummax(starts, axis=1)


def dense_mask(rule: Rule, keys: int, segments: jax.Array | None = None, queries: int | None = None,
               first: jax.Array | int = 0) -> jax.Array:
    """The mask of `rule` with documents kept apart: bool [batch or 1, Q, K].

    `segments` [batch, keys] are document numbers; 0 is padding, which nobody sees and which sees nobody. The queries
    are the keys' own tokens `first .. first + queries` (all of them unless told otherwise).
    """
    queries = keys if queries is None else queries
    index = jnp.arange(keys, dtype=jnp.int32)
    position = jnp.atleast_2d(document_positions(rule, keys, segments))

    def rows(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(x, first, queries, axis=x.ndim - 1)

    mask = rule.visible(Site(rows(index)[None, :, None], rows(position)[:, :, None]),
                        Site(index[None, None, :], position[:, None, :]))
    if segments is None:
        return mask
    q_segments = rows(segments)[:, :, None]
    return mask & (q_segments == segments[:, None, :]) & (q_segments > 0)
