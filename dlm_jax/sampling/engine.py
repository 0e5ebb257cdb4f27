"""The sampler's engine: one jitted loop over blocks, and inside it one over denoising steps.

A bidirectional model has one block, the whole stream. A block-causal model decodes block after block against a cache of
the finished ones. A causal model is the case of one token a block, which is read off the token before.

Letters: b sequences, n places, B places of a block, d width, v vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.attention.rules import Bidirectional, BlockCausal, Causal
from dlm_jax.diffusion.objective import shift
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import Cache, empty_cache, forward, forward_cached, unembed
from dlm_jax.models.weights import Params
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.selector import Selector


@struct.dataclass
class Canvas:
    """tokens: int [b, n]; masked: bool [b, n], the places the sampler fills; segments: int [b, n], 1, 0 for padding."""

    tokens: jax.Array
    masked: jax.Array
    segments: jax.Array


@struct.dataclass
class Trace:
    """What happened on the canvas; every array is [b, n] but the count.

    order: int, the step at which a place was committed, from 1; 0 for given places. confidence: fp32, the probability
    of a committed token when it was committed. forwards: how many forward passes were made, re-encoding and prefill
    included.
    """

    tokens: jax.Array
    masked: jax.Array
    order: jax.Array
    confidence: jax.Array
    forwards: jax.Array


@struct.dataclass
class Sampler:
    """How to sample: what to propose, where to commit, and in how many steps each sequence fills a block, or the one
    stream: int [b]. The steps are data, so that another number of them compiles nothing."""

    steps: jax.Array
    proposal: Proposal = struct.field(pytree_node=False)
    selector: Selector = struct.field(pytree_node=False)


Predict = Callable[[jax.Array, Any], tuple[jax.Array, Any]]


@functools.partial(jax.jit, static_argnames=("config", "card"))
def run(params: Params, canvas: Canvas, keys: jax.Array, sampler: Sampler, *, config: ModelConfig, card: Card) -> Trace:
    """Fills the canvas. keys: [b], one a sequence. n is a multiple of the block of a block-causal model.

    A sequence that has committed the end token in a finished block is not continued into the next ones.
    """
    zeros = jnp.zeros(canvas.tokens.shape)
    trace = Trace(canvas.tokens, canvas.masked, zeros.astype(jnp.int32), zeros, jnp.int32(0))
    decode = {"bidirectional": decode_at_once, "block_causal": decode_blocks, "token_causal": decode_blocks,
              "causal": decode_causally}[card.rule]
    return decode(params, trace, canvas.segments, keys, config=config, card=card, sampler=sampler)


def decode_at_once(params: Params, trace: Trace, segments: jax.Array, keys: jax.Array, *, config: ModelConfig,
                   card: Card, sampler: Sampler) -> Trace:
    """One stream under full visibility."""

    def predict(tokens: jax.Array, state: None) -> tuple[jax.Array, None]:
        hidden = forward(params, tokens, config=config, rule=Bidirectional(), segments=segments)
        hidden = shift(hidden) if card.alignment == "shifted" else hidden
        return unembed(params, hidden, config), state

    trace, _ = denoise(predict, None, trace, keys, card.mask_token_id, sampler, jnp.int32(0))
    return trace


def decode_blocks(params: Params, trace: Trace, segments: jax.Array, keys: jax.Array, *, config: ModelConfig,
                  card: Card, sampler: Sampler) -> Trace:
    """Block by block: denoise against the cache of the finished blocks, then write the finished block into it."""
    b, n = trace.tokens.shape
    size = card.block_size or 1
    model = functools.partial(forward_cached, params, config=config, segments=segments)
    noisy, clean = BlockCausal(size), BlockCausal(size) if card.rule == "block_causal" else Causal()
    first = jnp.argmax(jnp.any(trace.masked, 0)) // size
    # Prefill; blocks with holes are written again.
    hidden, cache = model(trace.tokens, empty_cache(config, b, n), 0, rule=clean)
    before = jnp.take(hidden, jnp.maximum(first * size - 1, 0), axis=1)

    def block(carry: tuple[jax.Array, Trace, Cache, jax.Array]) -> tuple[jax.Array, Trace, Cache, jax.Array]:
        number, trace, cache, before = carry
        start = number * size

        def predict(tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
            hidden, cache = model(tokens, cache, start, rule=noisy)
            hidden = shift(hidden, before) if card.alignment == "shifted" else hidden
            return unembed(params, hidden, config), cache

        part = slice_trace(trace, start, size)
        part, cache = denoise(predict, cache, part, fold(keys, number), card.mask_token_id, sampler,
                              jnp.max(trace.order))
        hidden, cache = model(part.tokens, cache, start, rule=clean)
        part = dataclasses.replace(part, forwards=part.forwards + 1)
        trace = stop_at_end(put_back(trace, part, start), start + size, card.eos_token_id)
        return number + 1, trace, cache, hidden[:, -1]

    def unfinished(carry: tuple[jax.Array, Trace, Cache, jax.Array]) -> jax.Array:
        return jnp.any(carry[1].masked)

    start = (first, dataclasses.replace(trace, forwards=jnp.int32(1)), cache, before)
    return jax.lax.while_loop(unfinished, block, start)[1]


def decode_causally(params: Params, trace: Trace, segments: jax.Array, keys: jax.Array, *, config: ModelConfig,
                    card: Card, sampler: Sampler) -> Trace:
    """Plain autoregressive decoding with a cache: the output at n-1 is the token at n."""
    b, n = trace.tokens.shape
    model = functools.partial(forward_cached, params, config=config, rule=BlockCausal(1), segments=segments)
    first = jnp.argmax(jnp.any(trace.masked, 0))
    hidden, cache = model(trace.tokens, empty_cache(config, b, n), 0)
    before = jnp.take(hidden, jnp.maximum(first - 1, 0), axis=1)

    def token(carry: tuple[jax.Array, Trace, Cache, jax.Array]) -> tuple[jax.Array, Trace, Cache, jax.Array]:
        place, trace, cache, before = carry
        logits = without(unembed(params, before[:, None], config), card.mask_token_id)
        part = slice_trace(trace, place, 1)
        proposed, confidence = sampler.proposal(fold(keys, place), logits)
        part = commit(part, part.masked, proposed, confidence, place - first + 1)
        hidden, cache = model(part.tokens, cache, place)
        trace = put_back(trace, dataclasses.replace(part, forwards=trace.forwards + 1), place)
        return place + 1, stop_at_end(trace, place + 1, card.eos_token_id), cache, hidden[:, -1]

    def unfinished(carry: tuple[jax.Array, Trace, Cache, jax.Array]) -> jax.Array:
        return jnp.any(carry[1].masked)

    start = (first, dataclasses.replace(trace, forwards=jnp.int32(1)), cache, before)
    return jax.lax.while_loop(unfinished, token, start)[1]


def denoise(predict: Predict, state: Any, trace: Trace, keys: jax.Array, mask_id: int | None,
            sampler: Sampler, begun: jax.Array) -> tuple[Trace, Any]:
    """Steps until nothing is masked: predict every place, propose, commit what the selector takes. `begun` steps were
    made before."""
    assert mask_id is not None, "a model that denoises has a mask token"

    def step(carry: tuple[jax.Array, Trace, Any]) -> tuple[jax.Array, Trace, Any]:
        number, trace, state = carry
        logits, state = predict(jnp.where(trace.masked, mask_id, trace.tokens), state)
        step_keys = fold(keys, number)
        proposed, confidence = sampler.proposal(fold(step_keys, 0), without(logits, mask_id))
        steps_left = jnp.maximum(sampler.steps - number, 1)[:, None]
        chosen = sampler.selector(fold(step_keys, 1), confidence, trace.masked, steps_left)
        trace = commit(trace, chosen, proposed, confidence, begun + number + 1)
        return number + 1, dataclasses.replace(trace, forwards=trace.forwards + 1), state

    def unfinished(carry: tuple[jax.Array, Trace, Any]) -> jax.Array:
        return jnp.any(carry[1].masked)

    _, trace, state = jax.lax.while_loop(unfinished, step, (jnp.int32(0), trace, state))
    return trace, state


def without(logits: jax.Array, token: int | None) -> jax.Array:
    """Logits [..., v] that never propose `token`: a text does not hold the mask."""
    return logits if token is None else logits.at[..., token].set(-jnp.inf)


def commit(trace: Trace, chosen: jax.Array, tokens: jax.Array, confidence: jax.Array, order: jax.Array) -> Trace:
    """Writes `tokens` at the chosen places."""
    return dataclasses.replace(trace, tokens=jnp.where(chosen, tokens, trace.tokens), masked=trace.masked & ~chosen,
                               order=jnp.where(chosen, order, trace.order),
                               confidence=jnp.where(chosen, confidence, trace.confidence))


def stop_at_end(trace: Trace, end: jax.Array, eos_id: int | None) -> Trace:
    """Gives up the places from `end` on of every sequence that has committed the end token."""
    if eos_id is None:
        return trace
    ended = jnp.any((trace.tokens == eos_id) & (trace.order > 0), -1, keepdims=True)
    return dataclasses.replace(trace, masked=trace.masked & ~(ended & (jnp.arange(trace.masked.shape[1]) >= end)))


def slice_trace(trace: Trace, start: jax.Array, size: int) -> Trace:
    """The places start .. start + size."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size, axis=1)
    return Trace(cut(trace.tokens), cut(trace.masked), cut(trace.order), cut(trace.confidence), trace.forwards)


def put_back(trace: Trace, part: Trace, start: jax.Array) -> Trace:
    """The inverse of `slice_trace`."""
    def put(whole: jax.Array, piece: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, piece, start, axis=1)

    return Trace(put(trace.tokens, part.tokens), put(trace.masked, part.masked), put(trace.order, part.order),
                 put(trace.confidence, part.confidence), part.forwards)


def fold(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Each sequence's key for a step, a block or a purpose."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
