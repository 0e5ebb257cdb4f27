"""Left to right: autoregressive decoding, and self-speculation, which gives the same text in fewer passes.

A model with a token-causal clean half is both: its noisy half guesses the rest of a block at once (a draft), and its
clean half reads the guesses in one causal pass, which says at each place what it would have written itself. The
longest run on which they agree is kept, and the first token after it is the causal half's own (linear
self-speculation, Nemotron-Labs-Diffusion, arXiv 2607.05722). What a place draws depends on its key and on the text
before it alone, so that the text is that of autoregressive decoding, token for token, at any temperature.

With blocks of one token there is nothing to guess, and this is plain autoregressive decoding with a cache.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.models.transformer import unembed
from dlm_jax.sampling.proposal import without
from dlm_jax.sampling.reading import CACHES, Memory, Model, empty_memory, read_block, read_whole
from dlm_jax.sampling.trace import Sampler, Trace, active, fold_places, stop_at_end, told


@struct.dataclass
class State:
    """drafted: bool [b], whether the masked places of the block in work hold guesses; made: int [b], how often some
    were settled."""

    trace: Trace
    memory: Memory
    drafted: jax.Array
    made: jax.Array


def write_left_to_right(model: Model, trace: Trace, keys: jax.Array, sampler: Sampler) -> Trace:
    """Settles the masked places, which are the last of each sequence, one after the other."""
    b, n = trace.tokens.shape
    memory = empty_memory(model, CACHES["block"])
    first = jnp.argmax(trace.masked, -1)
    _, before, memory = read_whole(model, trace.tokens, first, jnp.full(b, n), memory)
    token, confidence = propose(model, before[:, None], first[:, None], keys, sampler)
    here = (jnp.arange(n) == first[:, None]) & trace.masked
    trace = dataclasses.replace(trace, forwards=trace.forwards + 1, passes=trace.passes + 1)
    trace = settle(trace, here, token, confidence, jnp.ones(b, jnp.int32), sampler)
    told(sampler.callback, trace)
    start = State(trace, memory, jnp.zeros(b, bool), jnp.ones(b, jnp.int32))
    return jax.lax.while_loop(lambda s: jnp.any(active(s.trace)), lambda s: make_pass(s, model, keys, sampler),
                              start).trace


def make_pass(state: State, model: Model, keys: jax.Array, sampler: Sampler) -> State:
    """One pass of the model: some sequences draft the rest of the block of their last settled place, and others read
    that block causally."""
    trace, size = state.trace, model.size
    first = jnp.argmax(trace.masked, -1)
    start = (first - 1) // size * size
    drafts = (first % size != 0) & ~state.drafted
    tokens = jnp.where(trace.masked & drafts[:, None], model.card.mask_token_id or 0, trace.tokens)
    hidden, _, memory = read_block(model, tokens, start, jnp.where(drafts, start, start + size), state.memory)
    if model.card.alignment == "same_position":  # so that also a draft's outputs stand one place before their tokens
        hidden = jnp.where(drafts[:, None, None], jnp.roll(hidden, -1, axis=1), hidden)
    found, confidence = propose(model, hidden, start[:, None] + 1 + jnp.arange(size), keys, sampler)
    index = jnp.arange(trace.tokens.shape[1]) - 1 - start[:, None]
    found, confidence = (jnp.take_along_axis(x, jnp.clip(index, 0, size - 1), -1) for x in (found, confidence))
    open_ = trace.masked & (index < size) & active(trace)[:, None]
    missed = jnp.cumsum(open_ & (found != trace.tokens), -1) - (open_ & (found != trace.tokens))
    kept = open_ & (missed == 0) & ~drafts[:, None]
    trace = dataclasses.replace(trace, forwards=trace.forwards + active(trace), passes=trace.passes + 1,
                                tokens=jnp.where(open_ & drafts[:, None], found, trace.tokens))
    made = state.made + ~drafts
    trace = settle(trace, kept, found, confidence, made, sampler)
    told(sampler.callback, trace)
    return State(trace, memory, drafts, made)


def propose(model: Model, hidden: jax.Array, places: jax.Array, keys: jax.Array, sampler: Sampler
            ) -> tuple[jax.Array, jax.Array]:
    """Tokens int [b, m] for `places` int [b, m], and the model's probability of each, of the outputs [b, m, d] that
    predict them."""
    logits = without(unembed(model.params, hidden, model.config), model.card.mask_token_id)
    return sampler.proposal(fold_places(keys, places), logits)


def settle(trace: Trace, kept: jax.Array, tokens: jax.Array, confidence: jax.Array, order: jax.Array,
           sampler: Sampler) -> Trace:
    """Writes the tokens that are kept; what follows an end is given up."""
    trace = dataclasses.replace(
        trace, tokens=jnp.where(kept, tokens, trace.tokens), masked=trace.masked & ~kept,
        order=jnp.where(kept, order[:, None], trace.order), confidence=jnp.where(kept, confidence, trace.confidence))
    return stop_at_end(trace, jnp.zeros_like(order), sampler.end)
