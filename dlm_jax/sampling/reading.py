"""How the model is read while it denoises: the whole canvas, or a part of it against a cache.

A cache is a frozen object too, one of `CACHES`. `block` is exact for block-causal models: nothing before a block
changes once it is finished, so a finished block is read once more, clean, and then stays in the cache. For
bidirectional models nothing stays as it was when a token changes, and `prefix` and `dual` are approximations
(Fast-dLLM, arXiv 2505.22618): the canvas is read as a whole when a block is begun, and until the block is full what
stands before it (`prefix`), or all around it (`dual`), is taken as it was then.

Letters: b sequences, n places of the canvas, B places in work of each sequence, d width.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.attention.rules import Bidirectional, BlockCausal, Causal, CausalPast, Rule
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import Cache, empty_cache, forward, forward_cached
from dlm_jax.models.weights import Params


@dataclasses.dataclass(frozen=True)
class Caching:
    """rule: the models it is for (any, where None). window: what is read between two readings of the whole canvas.
    finishes: whether a finished block is read once more, clean; else the whole canvas is, when the next is begun."""

    rule: str | None = None
    window: Literal["nothing", "block", "suffix"] = "nothing"
    finishes: bool = False


CACHES = {
    "none": Caching(),
    "block": Caching("block_causal", "block", finishes=True),
    "prefix": Caching("bidirectional", "suffix"),
    "dual": Caching("bidirectional", "block"),
}


@struct.dataclass
class Model:
    """A model and the canvas it reads. segments: int [b, n], 1, and 0 for padding; size: B, which divides n."""

    params: Params
    segments: jax.Array
    config: ModelConfig = struct.field(pytree_node=False)
    card: Card = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)

    def rule(self, clean: jax.Array) -> Rule:
        """Who sees whom, where the first `clean` places, int [b], of each sequence are finished."""
        if self.card.rule == "bidirectional":
            return Bidirectional()
        if self.card.rule == "causal":
            return Causal()
        size = self.card.block_size or 1
        return CausalPast(size, clean[:, None]) if self.card.clean_half == "token_causal" else BlockCausal(size)


@struct.dataclass
class Memory:
    """What is kept from one reading to the next. cache: keys and values, or None; before: [b, d], the output at the
    place before those in work, which predicts the first of them where outputs are shifted."""

    cache: Cache | None
    before: jax.Array


# (model, tokens [b, n], start [b], clean [b], memory) -> (outputs at the places in work [b, B, d], at the one before
# them [b, d], memory)
Read = Callable[[Model, jax.Array, jax.Array, jax.Array, Memory], tuple[jax.Array, jax.Array, Memory]]


def empty_memory(model: Model, caching: Caching) -> Memory:
    """Nothing is known yet."""
    b, n = model.segments.shape
    dtype = model.params["embed"]["tokens"].dtype
    cache = None if caching.window == "nothing" else empty_cache(model.config, b, n, dtype)
    return Memory(cache, jnp.zeros((b, model.config.width), dtype))


def read_whole(model: Model, tokens: jax.Array, start: jax.Array, clean: jax.Array, memory: Memory
               ) -> tuple[jax.Array, jax.Array, Memory]:
    """Reads the canvas; fills the cache where there is one."""
    rule = model.rule(clean)
    if memory.cache is None:
        hidden, cache = forward(model.params, tokens, config=model.config, rule=rule, segments=model.segments,
                                dtype=memory.before.dtype), None
    else:
        hidden, cache = forward_cached(model.params, tokens, memory.cache, 0, config=model.config, rule=rule,
                                       segments=model.segments)
    before = take(hidden, jnp.maximum(start - 1, 0), 1)[:, 0]
    return take(hidden, start, model.size), before, Memory(cache, before)


def read_block(model: Model, tokens: jax.Array, start: jax.Array, clean: jax.Array, memory: Memory
               ) -> tuple[jax.Array, jax.Array, Memory]:
    """Reads the places in work against the cache, and writes them into it."""
    assert memory.cache is not None
    hidden, cache = forward_cached(model.params, take(tokens, start, model.size), memory.cache, start,
                                   config=model.config, rule=model.rule(clean), segments=model.segments)
    finished = clean > start
    return hidden, memory.before, Memory(cache, jnp.where(finished[:, None], hidden[:, -1], memory.before))


def read_suffix(model: Model, tokens: jax.Array, start: jax.Array, clean: jax.Array, memory: Memory, width: int
                ) -> tuple[jax.Array, jax.Array, Memory]:
    """Reads the last `width` places of the canvas, among which are those in work; what stands before these stays in the
    cache as it was."""
    assert memory.cache is not None
    n = tokens.shape[1]
    first = n - width
    here = first + jnp.arange(width) >= start[:, None]
    hidden, cache = forward_cached(model.params, tokens[:, first:], memory.cache, first, config=model.config,
                                   rule=model.rule(clean), segments=model.segments, write=here)
    return take(hidden, start - first, model.size), memory.before, Memory(cache, memory.before)


def take(x: jax.Array, start: jax.Array, size: int) -> jax.Array:
    """The places start .. start + size of each sequence: [b, n, ...] -> [b, size, ...]; start: int [b]."""
    if size == x.shape[1]:
        return x
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(x, start)


def put(x: jax.Array, part: jax.Array, start: jax.Array) -> jax.Array:
    """`x` [b, n] with `part` [b, size] at each sequence's place start: the inverse of `take`."""
    if part.shape == x.shape:
        return part
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))(x, part, start)
