"""Left-to-right decoding: autoregressive, and self-speculative, which gives the same text in fewer forward passes.

A model with a token-causal clean half can do both. Its noisy half drafts the rest of a block at once; its clean half
verifies the draft in one causal forward pass, which gives the token it would have written at each position. The longest
prefix on which the two agree is kept, and the first token after it is the causal half's own (linear self-speculation,
Nemotron-Labs-Diffusion, arXiv 2607.05722). What is drawn at a position depends only on its key and on the text before
it, so the text is that of autoregressive decoding, token for token, at any temperature.

With blocks of one token there is nothing to draft, and this is plain autoregressive decoding with a cache.

Letters: b sequences, n positions of the canvas, w positions of a block, d width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from dlm_jax.models.transformer import unembed
from dlm_jax.sampling.cached_forward import CACHES, CacheState, CanvasModel, empty_cache_state, forward_block, prefill
from dlm_jax.sampling.proposal import without
from dlm_jax.sampling.trace import (
    Sampler,
    Trace,
    count_forward,
    fold_position_keys,
    notify,
    stop_at_end,
    unfinished,
)
from dlm_jax.typing import Bool, Float, Float32, Int, Key, shape_checked


@struct.dataclass
class SpeculationState:
    """The loop carry."""

    trace: Trace
    cache_state: CacheState
    drafted: Bool[Array, " b"]  # the masked positions of the current block hold a draft
    steps_taken: Int[Array, " b"]  # how often each sequence has committed tokens


def write_left_to_right(model: CanvasModel, trace: Trace, keys: Key[Array, " b"], sampler: Sampler) -> Trace:
    """Fills the masked positions, which are the last of each sequence, one after the other. The prefill of the prompt
    gives the first token."""
    b, n = trace.tokens.shape
    cache_state = empty_cache_state(model, CACHES["block"])
    first = jnp.argmax(trace.masked, -1)
    _, prev_hidden, cache_state = prefill(model, trace.tokens, first, jnp.full(b, n), cache_state)
    token, confidence = propose(model, prev_hidden[:, None], first[:, None], keys, sampler)
    kept = (jnp.arange(n) == first[:, None]) & trace.masked
    trace = count_forward(trace, jnp.ones(b, bool))
    trace = commit(trace, kept, token, confidence, jnp.ones(b, jnp.int32), sampler)
    notify(sampler.callback, trace)
    start = SpeculationState(trace, cache_state, drafted=jnp.zeros(b, bool), steps_taken=jnp.ones(b, jnp.int32))
    return jax.lax.while_loop(lambda s: jnp.any(unfinished(s.trace)),
                              lambda s: draft_or_verify(s, model, keys, sampler), start).trace


def draft_or_verify(state: SpeculationState, model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler
                    ) -> SpeculationState:
    """One forward pass of the batch: some sequences draft the rest of the block that holds their last committed token,
    and the others verify that block causally."""
    trace, size = state.trace, model.block_size
    active = unfinished(trace)
    first = jnp.argmax(trace.masked, -1)
    start = (first - 1) // size * size
    # At a block's start the next token is already predicted, so there is nothing to draft.
    drafts = (first % size != 0) & ~state.drafted
    proposed, confidence, cache_state = propose_block(state, start, drafts, model, keys, sampler)
    # The masked positions, of all n, that this block's outputs predict.
    open_positions = trace.masked & (jnp.arange(trace.tokens.shape[1]) <= start[:, None] + size) & active[:, None]
    kept = agreed_prefix(open_positions, proposed == trace.tokens) & ~drafts[:, None]
    drafted_tokens = jnp.where(open_positions & drafts[:, None], proposed, trace.tokens)
    trace = dataclasses.replace(count_forward(trace, active), tokens=drafted_tokens)
    steps_taken = state.steps_taken + (~drafts).astype(jnp.int32)
    trace = commit(trace, kept, proposed, confidence, steps_taken, sampler)
    notify(sampler.callback, trace)
    return SpeculationState(trace, cache_state, drafts, steps_taken)


def propose_block(state: SpeculationState, start: Int[Array, " b"], drafts: Bool[Array, " b"], model: CanvasModel,
                  keys: Key[Array, " b"], sampler: Sampler
                  ) -> tuple[Int[Array, "b n"], Float32[Array, "b n"], CacheState]:
    """Proposals from the block at `start`: noisy where a sequence `drafts`, clean elsewhere.

    Returns tokens [b, n], the model's probability of each, and the cache. The output at a position predicts the next
    one, so they are meaningful at start + 1 .. start + w of each sequence only.
    """
    trace, size = state.trace, model.block_size
    tokens = jnp.where(trace.masked & drafts[:, None], model.spec.mask_token_id or 0, trace.tokens)
    finished = jnp.where(drafts, start, start + size)
    hidden, _, cache_state = forward_block(model, tokens, start, finished, state.cache_state)
    if model.spec.alignment == "same_position":  # move a draft's outputs to one position before their tokens
        hidden = jnp.where(drafts[:, None, None], jnp.roll(hidden, -1, axis=1), hidden)
    proposed, confidence = propose(model, hidden, start[:, None] + 1 + jnp.arange(size), keys, sampler)
    index = jnp.clip(jnp.arange(trace.tokens.shape[1]) - 1 - start[:, None], 0, size - 1)
    return (jnp.take_along_axis(proposed, index, -1), jnp.take_along_axis(confidence, index, -1), cache_state)


@shape_checked
def agreed_prefix(open_positions: Bool[Array, "b n"], agrees: Bool[Array, "b n"]) -> Bool[Array, "b n"]:
    """The open positions of each sequence up to and including the first at which draft and verifier disagree.

    The cumulative sum counts the disagreements up to and including a position. Less the position's own, it counts
    those strictly before it, and a position belongs to the prefix if there are none.
    """
    disagrees = (open_positions & ~agrees).astype(jnp.int32)
    disagreements_before = jnp.cumsum(disagrees, -1) - disagrees
    return open_positions & (disagreements_before == 0)


@shape_checked
def propose(model: CanvasModel, hidden: Float[Array, "b m d"], positions: Int[Array, "b m"], keys: Key[Array, " b"],
            sampler: Sampler) -> tuple[Int[Array, "b m"], Float32[Array, "b m"]]:
    """Tokens for `positions`, and the model's probability of each. hidden: the outputs that predict them."""
    logits = without(unembed(model.params, hidden, model.config), model.spec.mask_token_id,
                     *sampler.suppress_tokens)
    return sampler.proposal(fold_position_keys(keys, positions), logits)


@shape_checked
def commit(trace: Trace, kept: Bool[Array, "b n"], tokens: Int[Array, " b #n"], confidence: Float32[Array, " b #n"],
           step: Int[Array, " b"], sampler: Sampler) -> Trace:
    """Writes the tokens at the `kept` positions; what follows an end token is left unfilled."""
    trace = dataclasses.replace(
        trace, tokens=jnp.where(kept, tokens, trace.tokens), masked=trace.masked & ~kept,
        commit_step=jnp.where(kept, step[:, None], trace.commit_step),
        confidence=jnp.where(kept, confidence, trace.confidence))
    return stop_at_end(trace, jnp.zeros_like(step), sampler.eos_id)
