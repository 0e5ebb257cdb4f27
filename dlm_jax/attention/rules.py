"""Mask rules: which run of keys a query sees.

Every rule is said by intervals: of each region of the keys (the text; with two streams the noisy half and the clean
half), a query sees one run [lo, hi). From that follow the mask, the count of visible pairs, and which tiles a kernel
may skip. Blocks are counted from the start of a document, so a packed document is masked exactly as it would be alone.
"""

from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from flax import struct

Interval = tuple[Any, Any]  # first key seen and one past the last, int arrays of the shape of the rows


@struct.dataclass
class Rows:
    """Queries, by their places in the stream: int arrays [..., Q], of numpy (a static rule) or of JAX.

    index: of the token; start, end: the first token of its document in its half of the stream, and one past the last.
    """

    index: Any
    start: Any
    end: Any

    def block(self, size: int) -> Interval:
        """The block of `size` tokens that the row is in."""
        begin = self.start + (self.index - self.start) // size * size
        return begin, self.index.__array_namespace__().minimum(begin + size, self.end)


class Rule(Protocol):
    """What every mask rule offers."""

    def __hash__(self) -> int:
        ...

    def half(self, length: int) -> int:
        """Tokens in one stream, where the whole input has `length`."""
        ...

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        """The keys that each row sees of its own document, one interval a region."""
        ...


@struct.dataclass
class OneStream:
    """Base of the rules whose stream is the text itself."""

    def half(self, length: int) -> int:
        return length


@struct.dataclass
class Causal(OneStream):
    """A token sees itself and the past."""

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        return ((rows.start, rows.index + 1),)


@struct.dataclass
class Bidirectional(OneStream):
    """A token sees its whole document."""

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        return ((rows.start, rows.end),)


@struct.dataclass
class BlockCausal(OneStream):
    """A token sees its own block and all earlier blocks. Annealing by growing blocks is this rule with other sizes."""

    block: int = struct.field(pytree_node=False)

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        return ((rows.start, rows.block(self.block)[1]),)


@struct.dataclass
class LastBlock(OneStream):
    """The last block of a document sees itself whole, and everything before it is causal: how a model whose clean half
    is token-causal denoises the end of a text."""

    block: int = struct.field(pytree_node=False)

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        last = rows.start + (rows.end - 1 - rows.start) // self.block * self.block
        where = rows.index.__array_namespace__().where
        return ((rows.start, where(rows.index >= last, rows.end, rows.index + 1)),)


@struct.dataclass
class LookAhead(OneStream):
    """A token sees the past and the next `ahead` tokens: annealing by a horizon that grows, int32 scalar."""

    ahead: jax.Array

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        return ((rows.start, jnp.minimum(rows.index + 1 + self.ahead, rows.end)),)


@struct.dataclass
class CausalPast(OneStream):
    """What `BlockDiffusion` with a token-causal clean half is when it decodes: the first `clean` tokens see themselves
    and the past, and those after them their whole block and all before it. clean: int [batch, 1]."""

    block: int = struct.field(pytree_node=False)
    clean: jax.Array

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        end = jnp.where(rows.index - rows.start < self.clean, rows.index + 1, rows.block(self.block)[1])
        return ((rows.start + jnp.zeros_like(end), end),)


@struct.dataclass
class BlockDiffusion:
    """Two streams [noisy || clean] of `length` tokens each (BD3-LM, arXiv 2503.09573; Efficient-DLM, 2512.14067).

    A noisy token sees the noisy tokens of its own block and the clean tokens of earlier blocks; nothing clean sees
    anything noisy. A clean token sees the clean tokens of its own and earlier blocks (`block_causal`), or of itself and
    the past only (`token_causal`, so that the clean half is the AR model).
    """

    length: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)
    clean_half: Literal["block_causal", "token_causal"] = struct.field(pytree_node=False, default="block_causal")

    def half(self, length: int) -> int:
        return self.length

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        where = rows.index.__array_namespace__().where
        noisy, (begin, end) = rows.index < self.length, rows.block(self.block)
        clean_end = end if self.clean_half == "block_causal" else rows.index + 1
        own_block = where(noisy, begin, 0), where(noisy, end, 0)
        clean = where(noisy, rows.start + self.length, rows.start), where(noisy, begin + self.length, clean_end)
        return own_block, clean


@struct.dataclass
class Annealed(OneStream):
    """DiffuLLaMA's attention annealing (arXiv 2410.17891, section 3.2): the causal mask, and each future edge open with
    `probability`, drawn afresh for each `seed` and shared by batch, heads and layers.

    The draw is a counter hash of (seed, q, k), so that no L x L table of random numbers is needed to know an edge: a
    kernel makes it where it needs it. The interval is the whole document; `edges` says which of it is open.
    """

    probability: jax.Array  # fp32 scalar in [0, 1]
    seed: jax.Array  # uint32 scalar

    def intervals(self, rows: Rows) -> tuple[Interval, ...]:
        return ((rows.start, rows.end),)

    def edges(self, rows: Rows) -> "Edges":
        # 24 random bits an edge; the product is exact in fp32.
        threshold = jnp.ceil(self.probability * 2.0**24).astype(jnp.int32)
        row = hash32(rows.index.astype("uint32") ^ hash32(self.seed))
        return Edges(rows.index + 1, row, threshold + jnp.zeros_like(rows.index[:, :1]))


@struct.dataclass
class Edges:
    """Of the keys in a query's interval, those below `sure` are seen, and the others where their edge is open.

    sure: int32 [batch, Q]; row: uint32 [batch, Q], the row's part of the hash; threshold: int32 [batch, 1],
    0 .. 2^24. batch may be 1.
    """

    sure: jax.Array
    row: jax.Array
    threshold: jax.Array


def edge_open(row: jax.Array, key: jax.Array, threshold: jax.Array) -> jax.Array:
    """Whether the edge from a row to a key (int32 index) is open; the arrays broadcast. See `Edges`."""
    return (hash32(key.astype(jnp.uint32) ^ row) >> 8).astype(jnp.int32) < threshold


def hash32(x: jax.Array) -> jax.Array:
    """A bijective 32-bit integer hash with good avalanche (the constants are from C. Wellons's 'lowbias32')."""
    x = jnp.asarray(x).astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
