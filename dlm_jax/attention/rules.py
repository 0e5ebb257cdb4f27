"""Mask rules: which keys a query sees.

A `Rule` is what splash attention calls a `Mask` and FlexAttention a `mask_mod`, stated as intervals instead of pairs:
in each region of the keys (the text; with two streams the noisy half and the clean half) a query sees one run [lo, hi).
The dense mask, the count of visible pairs and the tiles that a kernel may skip all follow from the intervals. Blocks
are counted from the start of a document, so a packed document is masked exactly as it would be alone.
"""

from typing import Literal, Protocol, runtime_checkable

import jax.numpy as jnp

from dlm_jax import struct
from dlm_jax.hashing import hash32
from dlm_jax.segments import Documents
from dlm_jax.typing import Array, Float32, Int, Int32, UInt32

Interval = tuple[Array, Array]  # first visible key and one past the last, int arrays of the queries' shape


@runtime_checkable
class Rule(Protocol):
    """What every mask rule offers."""

    @property
    def block(self) -> int:
        """Tokens per block; 1 where the rule has none."""
        ...

    def __hash__(self) -> int:
        ...

    def stream_length(self, length: int) -> int:
        """Tokens in one stream of an input of `length` tokens."""
        ...

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        """The keys of its own document that each query sees, one interval per region."""
        ...


@struct.dataclass
class OneStream:
    """Base of the rules whose only stream is the text itself."""

    block = 1  # a rule without blocks has blocks of one token

    def stream_length(self, length: int) -> int:
        return length


@struct.dataclass
class Causal(OneStream):
    """A token sees itself and the past."""

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        return ((queries.start, queries.index + 1),)


@struct.dataclass
class Bidirectional(OneStream):
    """A token sees its entire document."""

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        return ((queries.start, queries.end),)


@struct.dataclass
class BlockCausal(OneStream):
    """A token sees its own block and all earlier blocks. Annealing by growing blocks is this rule with other sizes."""

    block: int = struct.field(pytree_node=False)  # tokens per block

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        return ((queries.start, queries.block(self.block)[1]),)


@struct.dataclass
class CausalThenLastBlock(OneStream):
    """Causal up to the last block of each document; the tokens of the last block see the entire document.

    This is how a model whose clean half is token-causal denoises the end of a text.
    """

    block: int = struct.field(pytree_node=False)  # tokens per block

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        last_block = queries.start + (queries.end - 1 - queries.start) // self.block * self.block
        where = queries.index.__array_namespace__().where
        return ((queries.start, where(queries.index >= last_block, queries.end, queries.index + 1)),)


@struct.dataclass
class LookAhead(OneStream):
    """A token sees the past and the next `ahead` tokens: annealing by a growing horizon."""

    ahead: Int32[Array, ""]

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        return ((queries.start, jnp.minimum(queries.index + 1 + self.ahead, queries.end)),)


@struct.dataclass
class CausalThenBlocks(OneStream):
    """Causal over the first `finished` tokens; each later token sees its own block and everything before it.

    This is `BlockDiffusion` with a token-causal clean half at decoding time, when the finished text is in the cache.
    """

    block: int = struct.field(pytree_node=False)  # tokens per block
    finished: Int[Array, "b 1"]  # how many leading tokens of each sequence are clean

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        is_finished = queries.index - queries.start < self.finished
        end = jnp.where(is_finished, queries.index + 1, queries.block(self.block)[1])
        return ((queries.start + jnp.zeros_like(end), end),)


@struct.dataclass
class BlockDiffusion:
    """Two streams [noisy || clean] of `length` tokens each (BD3-LM, arXiv 2503.09573; Efficient-DLM, 2512.14067).

    A noisy token sees the noisy tokens of its own block and the clean tokens of earlier blocks; no clean token sees a
    noisy one. A clean token sees the clean tokens of its own and earlier blocks (`block_causal`), or only itself and
    the past (`token_causal`, which makes the clean half the AR model). So does a noisy one with `causal`, of its block.
    """

    length: int = struct.field(pytree_node=False)  # tokens per stream, half of the input
    block: int = struct.field(pytree_node=False)  # tokens per block
    clean_half: Literal["block_causal", "token_causal"] = struct.field(pytree_node=False, default="block_causal")
    causal: bool = struct.field(pytree_node=False, default=False)  # whether a noisy token sees no later one

    def stream_length(self, length: int) -> int:
        return self.length

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        where = queries.index.__array_namespace__().where
        noisy, (begin, end) = queries.index < self.length, queries.block(self.block)
        clean_end = end if self.clean_half == "block_causal" else queries.index + 1
        own_block = where(noisy, begin, 0), where(noisy, queries.index + 1 if self.causal else end, 0)
        clean = where(noisy, queries.start + self.length, queries.start), where(noisy, begin + self.length, clean_end)
        return own_block, clean


@struct.dataclass
class Annealed(OneStream):
    """DiffuLLaMA's attention annealing (arXiv 2410.17891, section 3.2): the causal mask, plus each future edge with
    `probability`, redrawn for each `seed` and shared by batch, heads and layers.

    The draw is a counter-based hash of (seed, query, key), so a kernel computes an edge where it needs it and no
    L x L table of random numbers exists. The interval is the entire document; `edges` says which of it is open.
    """

    probability: Float32[Array, ""]  # of a future edge, in [0, 1]
    seed: UInt32[Array, ""]

    def intervals(self, queries: Documents) -> tuple[Interval, ...]:
        return ((queries.start, queries.end),)

    def edges(self, queries: Documents) -> "RandomEdges":
        # 24 random bits per edge; the product is exact in fp32.
        threshold = jnp.ceil(self.probability * 2.0**24).astype(jnp.int32)
        query_hash = hash32(queries.index.astype("uint32") ^ hash32(self.seed))
        return RandomEdges(queries.index + 1, query_hash, threshold + jnp.zeros_like(queries.index[:, :1]))


@struct.dataclass
class RandomEdges:
    """Which keys of a query's interval are visible: all below `always_visible_end`, and beyond it those whose edge to
    the query is open (`edge_open`). The batch may be 1."""

    always_visible_end: Int32[Array, "b Q"]
    query_hash: UInt32[Array, "b Q"]  # the query's part of the hash of an edge
    threshold: Int32[Array, "b 1"]  # an edge is open if its 24-bit hash is below this; 0 to 2^24


def edge_open(query_hash: Array, key: Array, threshold: Array) -> Array:
    """Whether the edge from a query to a key is open: bool. The arrays broadcast; key: int32 index, for the others see
    `RandomEdges`."""
    return (hash32(key.astype(jnp.uint32) ^ query_hash) >> 8).astype(jnp.int32) < threshold
