"""Left-to-right decoding: autoregressive, and self-speculative, which gives the same text in fewer forward passes.

A model with a token-causal clean half can do both. Its noisy half drafts the rest of a block at once; its clean half
verifies the draft causally, which gives the token it would have written at each position. The longest prefix on which
the two agree is kept, and the first token after it is the causal half's own. The same forward pass writes the next
draft (`drafting.py`), so each gives at least one token. What is drawn at a position depends only on its key and on the
text before it, so the text is that of autoregressive decoding, token for token, at any temperature.

With blocks of one token there is nothing to draft, and this is plain autoregressive decoding with a cache.

Letters: b sequences, n positions of the canvas, w positions of a block, d width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from dlm_jax.models.transformer import Cache, unembed
from dlm_jax.sampling.cached_forward import CACHES, CanvasModel, empty_cache_state, prefill
from dlm_jax.sampling.drafting import Draft, likeliest_outcomes, take_outcome, verify_and_draft, with_scratch
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
    cache: Cache
    draft: Draft
    steps_taken: Int[Array, " b"]  # how often each sequence has committed tokens


def write_left_to_right(model: CanvasModel, trace: Trace, keys: Key[Array, " b"], sampler: Sampler, outcomes: int
                        ) -> Trace:
    """Fills the masked positions, which are the last of each sequence, one after the other. The prefill of the prompt
    gives the first token.

    outcomes: for how many outcomes of a verification the next draft is written; 0 for autoregressive decoding.
    """
    b, n = trace.tokens.shape
    cache_state = empty_cache_state(model, CACHES["block"])
    first = jnp.argmax(trace.masked, -1)
    _, prev_hidden, cache_state = prefill(model, trace.tokens, first, jnp.full(b, n), cache_state)
    token, confidence = propose(model, prev_hidden[:, None], first[:, None], keys, sampler)
    kept = (jnp.arange(n) == first[:, None]) & trace.masked
    trace = count_forward(trace, jnp.ones(b, bool))
    trace = commit(trace, kept, token, confidence, jnp.ones(b, jnp.int32), sampler)
    notify(sampler.callback, trace)
    assert cache_state.cache is not None
    cache = with_scratch(cache_state.cache, outcomes * model.block_size)
    start = SpeculationState(trace, cache, Draft(first + 1, jnp.zeros((b, n))), steps_taken=jnp.ones(b, jnp.int32))
    return jax.lax.while_loop(lambda s: jnp.any(unfinished(s.trace)),
                              lambda s: speculate(s, model, keys, sampler, outcomes), start).trace


def speculate(state: SpeculationState, model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler, outcomes: int
              ) -> SpeculationState:
    """One forward pass of the batch, over the block that holds each sequence's last committed token."""
    trace, size = state.trace, model.block_size
    index, active = jnp.arange(trace.tokens.shape[1]), unfinished(trace)
    first = jnp.argmax(trace.masked, -1)
    start = (first - 1) // size * size
    expected = likeliest_outcomes(first, state.draft, size, outcomes)
    clean, noisy, cache = verify_and_draft(model, trace.tokens, start, expected, state.cache)

    proposed, confidence = propose_block(model, clean, start, keys, sampler)
    # The drafted positions and the one after them.
    verified = trace.masked & (index <= state.draft.end[:, None]) & active[:, None]
    kept = agreed_prefix(verified, proposed == trace.tokens)
    steps_taken = state.steps_taken + active
    trace = commit(count_forward(trace, active), kept, proposed, confidence, steps_taken, sampler)
    notify(sampler.callback, trace)
    # The last kept token is the verifier's own; the draft of its outcome starts behind it.
    last = first + jnp.sum(kept, -1) - 1
    draft = Draft(last + 1, state.draft.confidence)
    if outcomes:
        trace, draft = keep_draft(trace, last, expected, noisy, model, keys, sampler)
    return SpeculationState(trace, cache, draft, steps_taken)


def keep_draft(trace: Trace, last: Int[Array, " b"], expected: Int[Array, "b m"], noisy: Float[Array, "b m w d"],
               model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler) -> tuple[Trace, Draft]:
    """The trace with the draft of what follows position `last`, the outcome, in its block; none if `last` was not among
    the expected outcomes."""
    size, index = model.block_size, jnp.arange(trace.tokens.shape[1])
    start = last // size * size
    hidden, found = take_outcome(noisy, expected, last)
    if model.spec.alignment == "same_position":  # move the outputs to one position before their tokens
        hidden = jnp.roll(hidden, -1, axis=1)
    tokens, confidence = propose_block(model, hidden, start, keys, sampler)
    end = jnp.where(found, start + size, last + 1)
    drafted = trace.masked & (index > last[:, None]) & (index < end[:, None])
    return dataclasses.replace(trace, tokens=jnp.where(drafted, tokens, trace.tokens)), Draft(end, confidence)


def propose_block(model: CanvasModel, hidden: Float[Array, "b w d"], start: Int[Array, " b"], keys: Key[Array, " b"],
                  sampler: Sampler) -> tuple[Int[Array, "b n"], Float32[Array, "b n"]]:
    """Tokens [b, n], and the model's probability of each, from the outputs of the block at `start`, each of which
    predicts the next token. They are meaningful at start + 1 .. start + w of each sequence only."""
    size, n = model.block_size, model.segments.shape[1]
    proposed, confidence = propose(model, hidden, start[:, None] + 1 + jnp.arange(size), keys, sampler)
    index = jnp.clip(jnp.arange(n) - 1 - start[:, None], 0, size - 1)
    return jnp.take_along_axis(proposed, index, -1), jnp.take_along_axis(confidence, index, -1)


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
