"""Left-to-right decoding: autoregressive, and self-speculative, which gives the same text in fewer forward passes.

A model with a token-causal clean half can do both. Its noisy half drafts the rest of a block at once; its clean half
verifies the draft causally, which gives the token it would have written at each position. The longest prefix on which
the two agree is kept, and the first token after it is the causal half's own. The same forward pass writes the next
draft (`drafting.py`), and the one that reads the prompt the first, so each gives at least one token. What is drawn at a
position depends only on its key and on the text before it, so the text is that of autoregressive decoding, token for
token, at any temperature.

With blocks of one token there is nothing to draft, and this is plain autoregressive decoding with a cache. A model that
has learned no diffusion drafts by Jacobi iteration (arXiv 2305.10427): its own words about the last draft are the next.

Letters: b sequences, n positions of the canvas, w positions of a block, d width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array

from dlm_jax import struct
from dlm_jax.hashing import hash32
from dlm_jax.models.transformer import Cache, unembed
from dlm_jax.sampling.cached_forward import CACHES, CanvasModel, empty_cache_state, slice_window
from dlm_jax.sampling.drafting import (
    Draft,
    Outcomes,
    likeliest_outcomes,
    take_outcome,
    verify_and_draft,
    with_scratch,
)
from dlm_jax.sampling.proposal import probability, without
from dlm_jax.sampling.trace import (
    Sampler,
    Trace,
    count_forward,
    fold_position_keys,
    notify,
    stop_at_end,
    unfinished,
)
from dlm_jax.sampling.unmasking import Jacobi, Speculate
from dlm_jax.typing import Bool, Float, Float32, Int, Key, Shaped, shape_checked

GUESSES = 3  # tokens that are guessed at the position where a draft may end


@struct.dataclass
class SpeculationState:
    """The loop carry."""

    trace: Trace
    cache: Cache
    draft: Draft
    steps_taken: Int[Array, " b"]  # how often each sequence has committed tokens


def write_left_to_right(model: CanvasModel, trace: Trace, keys: Key[Array, " b"], sampler: Sampler) -> Trace:
    """Fills the masked positions, which are the last of each sequence, one after the other."""
    state = read_prompt(new_speculation_state(model, trace, sampler), model, keys, sampler, 0,
                        sampler.prompt_length or trace.tokens.shape[1])
    return jax.lax.while_loop(lambda s: jnp.any(unfinished(s.trace)), lambda s: advance(s, model, keys, sampler),
                              state).trace


def advance(state: SpeculationState, model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler) -> SpeculationState:
    """One forward pass of the batch."""
    step = iterate if isinstance(sampler.unmasking.selector, Jacobi) else speculate
    return step(state, model, keys, sampler)


def outcomes_of(sampler: Sampler, size: int) -> int:
    """For how many outcomes of a verification the next draft is written; none with blocks of one token."""
    assert isinstance(sampler.unmasking.selector, Speculate)
    if isinstance(sampler.unmasking.selector, Jacobi):
        return 0
    return min(sampler.unmasking.selector.outcomes, size * (GUESSES + 1)) if size > 1 else 0


def new_speculation_state(model: CanvasModel, trace: Trace, sampler: Sampler) -> SpeculationState:
    """The state before the prompt is read."""
    b, n = trace.tokens.shape
    cache = empty_cache_state(model, CACHES["block"]).cache
    assert cache is not None
    nothing = jnp.zeros((b, n, GUESSES))
    draft = Draft(jnp.argmax(trace.masked, -1) + 1, nothing.astype(jnp.int32), nothing)
    return SpeculationState(trace, with_scratch(cache, outcomes_of(sampler, model.block_size) * model.block_size),
                            draft, steps_taken=jnp.zeros(b, jnp.int32))


def read_prompt(state: SpeculationState, model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler,
                start: Int[Array, ""] | int, width: int) -> SpeculationState:
    """The state once the prompt is read, which gives the first token, and the draft of what follows it whatever it is.

    Reads the positions start .. start + width, which hold the last of each prompt; the cache knows what is before.
    """
    trace, first = state.trace, jnp.argmax(state.trace.masked, -1)
    position = first[:, None] if outcomes_of(sampler, model.block_size) else jnp.zeros((len(first), 0), jnp.int32)
    anything = Outcomes(position, jnp.full_like(position, model.spec.mask_token_id or 0))
    clean, noisy, cache = verify_and_draft(model, trace.tokens, start, width, anything, state.cache)
    last = slice_window(clean, jnp.maximum(first - 1 - start, 0), 1)
    token, confidence = propose(model, last, first[:, None], keys, sampler)
    kept = (jnp.arange(trace.tokens.shape[1]) == first[:, None]) & trace.masked
    trace = count_forward(trace, jnp.ones(len(first), bool))
    trace = commit(trace, kept, token, confidence, jnp.ones_like(first), sampler)
    notify(sampler.callback, trace)
    draft = state.draft
    if position.size:
        trace, draft = keep_draft(trace, draft, first, anything, noisy, model, keys, sampler)
    return SpeculationState(trace, cache, draft, steps_taken=jnp.ones_like(first))


def speculate(state: SpeculationState, model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler
              ) -> SpeculationState:
    """A pass over the block that holds each sequence's last committed token."""
    trace, size, outcomes = state.trace, model.block_size, outcomes_of(sampler, model.block_size)
    # A finished sequence stays at its last block, so that its cache keeps the prompt.
    first = first_masked(trace)
    start = (first - 1) // size * size
    expected = likeliest_outcomes(first, state.draft, size, outcomes, model.spec.mask_token_id or 0)
    clean, noisy, cache = verify_and_draft(model, trace.tokens, start, size, expected, state.cache)

    state, _, last = keep_agreed(state, clean, start, model, keys, sampler)
    # The last kept token is the verifier's own; the draft of its outcome starts behind it.
    trace, draft = state.trace, dataclasses.replace(state.draft, end=last + 1)
    if outcomes:
        trace, draft = keep_draft(trace, draft, last, expected, noisy, model, keys, sampler)
    return SpeculationState(trace, cache, draft, state.steps_taken)


def iterate(state: SpeculationState, model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler) -> SpeculationState:
    """A Jacobi iteration, over the last committed token and the positions behind it, which hold guesses. Where there is
    none yet, that is a token of the text before."""
    trace, size, (b, n) = state.trace, model.block_size, state.trace.tokens.shape
    index, first = jnp.arange(n), first_masked(trace)
    start = jnp.minimum(first - 1, n - size)
    somewhere = (hash32(index) >> 1).astype(jnp.int32) % first[:, None]
    unguessed = trace.masked & (index >= state.draft.end[:, None])
    guessed = jnp.where(unguessed, jnp.take_along_axis(trace.tokens, somewhere, 1), trace.tokens)
    draft = dataclasses.replace(state.draft, end=start + size)
    state = dataclasses.replace(state, trace=dataclasses.replace(trace, tokens=guessed), draft=draft)
    nothing = Outcomes(*jnp.zeros((2, b, 0), jnp.int32))
    clean, _, cache = verify_and_draft(model, guessed, start, size, nothing, state.cache)
    state, proposed, last = keep_agreed(state, clean, start, model, keys, sampler)
    said = state.trace.masked & (index > last[:, None]) & (index <= (start + size)[:, None])
    trace = dataclasses.replace(state.trace, tokens=jnp.where(said, proposed, state.trace.tokens))
    return SpeculationState(trace, cache, dataclasses.replace(draft, end=start + size + 1), state.steps_taken)


def first_masked(trace: Trace) -> Int[Array, " b"]:
    """The first masked position of each sequence; n where there is none."""
    return jnp.where(unfinished(trace), jnp.argmax(trace.masked, -1), trace.tokens.shape[1])


def keep_agreed(state: SpeculationState, clean: Float[Array, "b w d"], start: Int[Array, " b"], model: CanvasModel,
                keys: Key[Array, " b"], sampler: Sampler
                ) -> tuple[SpeculationState, Int[Array, "b n"], Int[Array, " b"]]:
    """The state with what the verifier keeps of the draft, and its own token behind that; what it would write at each
    position of the window at `start`, where `clean` are its outputs; and the position of the last kept token."""
    trace, size, n = state.trace, clean.shape[1], state.trace.tokens.shape[1]
    index, active, first = jnp.arange(n), unfinished(trace), first_masked(trace)
    proposed, confidence = by_position(propose(model, clean, start[:, None] + 1 + jnp.arange(size), keys, sampler),
                                       start, size, n)
    # The drafted positions and the one after them.
    verified = trace.masked & (index <= state.draft.end[:, None]) & active[:, None]
    kept = agreed_prefix(verified, proposed == trace.tokens)
    steps_taken = state.steps_taken + active
    trace = commit(count_forward(trace, active), kept, proposed, confidence, steps_taken, sampler)
    notify(sampler.callback, trace)
    state = dataclasses.replace(state, trace=trace, steps_taken=steps_taken)
    return state, proposed, first + jnp.sum(kept, -1) - 1


def keep_draft(trace: Trace, draft: Draft, last: Int[Array, " b"], expected: Outcomes,
               noisy: Float[Array, "b m w d"], model: CanvasModel, keys: Key[Array, " b"], sampler: Sampler
               ) -> tuple[Trace, Draft]:
    """The trace with the draft of what follows position `last`, the outcome, in its block. Nothing is drafted if `last`
    was not expected; what earlier passes have guessed about it stays."""
    size, index = model.block_size, jnp.arange(trace.tokens.shape[1])
    start, shifted = last // size * size, model.spec.alignment == "shifted"
    token = jnp.take_along_axis(trace.tokens, last[:, None], 1)[:, 0]
    hidden, found = take_outcome(noisy, expected, last, token, model.spec.mask_token_id or 0)
    if not shifted:  # move the outputs to one position before their tokens
        hidden = jnp.roll(hidden, -1, axis=1)
    guesses, probability = by_position(guess(model, hidden, start[:, None] + 1 + jnp.arange(size), keys, sampler),
                                       start, size, len(index))
    # A shifted block also says something about the token behind it.
    said = (found[:, None] & (index > last[:, None]) & (index < (start + size + shifted)[:, None]))[..., None]
    end = jnp.where(found, start + size, last + 1)
    drafted = trace.masked & (index > last[:, None]) & (index < end[:, None])
    trace = dataclasses.replace(trace, tokens=jnp.where(drafted, guesses[..., 0], trace.tokens))
    return trace, Draft(end, jnp.where(said, guesses, draft.guesses), jnp.where(said, probability, draft.probability))


def by_position(found: tuple[Shaped[Array, "b w *rest"], Shaped[Array, "b w *rest"]], start: Int[Array, " b"],
                size: int, n: int) -> tuple[Shaped[Array, "b n *rest"], Shaped[Array, "b n *rest"]]:
    """What the outputs of the block at `start` say about the next token, by the position of that token: meaningful at
    start + 1 .. start + w of each sequence only."""
    index = jnp.clip(jnp.arange(n) - 1 - start[:, None], 0, size - 1)
    first, second = (jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), 1) for x in found)
    return first, second


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
    return sampler.proposal(fold_position_keys(keys, positions), allowed_logits(model, hidden, sampler))


@shape_checked
def guess(model: CanvasModel, hidden: Float[Array, "b m d"], positions: Int[Array, "b m"], keys: Key[Array, " b"],
          sampler: Sampler) -> tuple[Int[Array, "b m k"], Float32[Array, "b m k"]]:
    """The first `GUESSES` tokens that `propose` would give, each if those before it were banned, and the model's
    probability of each."""
    logits, keys = allowed_logits(model, hidden, sampler), fold_position_keys(keys, positions)
    found, left = [], logits
    for _ in range(GUESSES):
        found.append(sampler.proposal.tokens(keys, left))
        left = jnp.where(jnp.arange(logits.shape[-1]) == found[-1][..., None], -jnp.inf, left)
    tokens = jnp.stack(found, -1)
    return tokens, probability(logits, tokens)


def allowed_logits(model: CanvasModel, hidden: Float[Array, "b m d"], sampler: Sampler) -> Float32[Array, "b m v"]:
    """The logits without those of tokens that are never written."""
    return without(unembed(model.params, hidden, model.config), model.spec.mask_token_id, *sampler.suppress_tokens)


@shape_checked
def commit(trace: Trace, kept: Bool[Array, "b n"], tokens: Int[Array, " b #n"], confidence: Float32[Array, " b #n"],
           step: Int[Array, " b"], sampler: Sampler) -> Trace:
    """Writes the tokens at the `kept` positions; what follows an end token is left unfilled."""
    trace = dataclasses.replace(
        trace, tokens=jnp.where(kept, tokens, trace.tokens), masked=trace.masked & ~kept,
        commit_step=jnp.where(kept, step[:, None], trace.commit_step),
        confidence=jnp.where(kept, confidence, trace.confidence))
    return stop_at_end(trace, jnp.zeros_like(step), sampler.eos_id)
