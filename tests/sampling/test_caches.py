"""What a cache may change: nothing for block-causal models, and for bidirectional ones what is measured here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.rules import BlockDiffusion
from dlm_jax.errors import UserError
from dlm_jax.models import transformer
from dlm_jax.sampling.cached_forward import (
    CACHES,
    CanvasModel,
    empty_cache_state,
    forward_block,
    forward_suffix,
    prefill,
)
from dlm_jax.sampling.engine import run
from dlm_jax.sampling.generation import make_canvas
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.trace import Sampler
from dlm_jax.sampling.unmasking import parse_unmasking
from dlm_jax.segments import find_documents

MASK = 30
HALVES = ("block_causal", "token_causal")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("unmasking,temperature", (("threshold:0.3", 0.0), ("random", 1.0)))
def test_cached_is_uncached_token_for_token(toy, prompts, half, unmasking, temperature):
    model = toy("block_causal", "shifted", 4, half=half)
    how = {"unmasking": unmasking, "temperature": temperature, "steps": 3}
    cached, uncached = (model.continued(prompts, 13, cache=cache, **how) for cache in ("block", "none"))
    if temperature == 0:
        assert [s.tokens for s in cached] == [s.tokens for s in uncached]
    for a, b in zip(cached, uncached, strict=True):
        blocks = -(-len(a.tokens) // 4) - sum(step == 0 for step in a.commit_step) // 4
        assert a.nfe == b.nfe + blocks - 1 or temperature  # one more forward pass caches each finished block


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
def test_two_stream_training_logits_are_cached_decoding_logits(toy, half, alignment):
    """Block by block: the finished text is in the cache, and some positions of the block are masked."""
    lm, n, size = toy("block_causal", alignment, 4, half=half), 16, 4
    random = np.random.default_rng(0)
    clean = random.integers(0, 30, (2, n))
    noisy = np.where(random.random((2, n)) < 0.6, MASK, clean)

    @jax.jit
    def two_streams(params, tokens):
        hidden = transformer.forward(params, tokens, config=lm.config, rule=BlockDiffusion(n, size, half))
        return transformer.unembed(params, hidden, lm.config)

    two = two_streams(lm.params, np.concatenate([noisy, clean], 1))
    segments = jnp.ones((2, n), jnp.int32)
    model = CanvasModel(lm.params, segments, find_documents(n, segments), jnp.zeros(2, jnp.int32), lm.config, lm.spec,
                        size)
    state = empty_cache_state(model, CACHES["block"])

    @functools.partial(jax.jit, static_argnames="forward")
    def logits(tokens, start, clean, state, forward):
        hidden, prev_hidden, state = forward(model, tokens, start, clean, state)
        return *(transformer.unembed(model.params, x, lm.config) for x in (hidden, prev_hidden)), state

    for start in range(0, n, size):
        at, forward = jnp.full(2, start), forward_block if start else prefill
        canvas = np.concatenate([clean[:, :start], noisy[:, start:]], 1)
        found, previous, state = logits(canvas, at, at, state, forward)
        np.testing.assert_allclose(found, two[:, start:start + size], atol=1e-4)
        if start:  # the first token of a block is predicted, in a shifted model, by the clean output before it
            np.testing.assert_allclose(previous, two[:, n + start - 1], atol=1e-4)
        _, _, state = logits(clean, at, at + size, state, forward_block)


def test_a_forward_pass_over_a_suffix_gives_the_window_of_one_over_the_canvas(toy):
    """Where the cache holds what the pass would compute, wherever in the suffix the window lies."""
    lm, n, size = toy("bidirectional", "same_position"), 32, 4
    tokens, segments = jnp.asarray(np.random.default_rng(0).integers(0, 30, (2, n))), jnp.ones((2, n), jnp.int32)
    model = CanvasModel(lm.params, segments, find_documents(n, segments), jnp.zeros(2, jnp.int32), lm.config, lm.spec,
                        size)
    start = jnp.array([18, 24])
    expected, _, state = prefill(model, tokens, start, start, empty_cache_state(model, CACHES["prefix"]))
    for width in (16, n):
        found, _, _ = forward_suffix(model, tokens, start, start, state, width)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_cache_of_a_bidirectional_model_is_exact_until_something_is_committed(toy, prompts):
    """A block whose positions are all committed in its first step never reads the cache."""
    model = toy("bidirectional", "same_position")
    exact, *approximate = (model.continued(prompts, 16, block=8, steps=2, cache=cache)
                           for cache in ("none", "prefix", "dual"))
    for samples in approximate:
        assert [s.tokens for s in samples] == [s.tokens for s in exact]
        assert [s.nfe for s in samples] == [s.nfe for s in exact]


@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
@pytest.mark.parametrize("cache", ("prefix", "dual"))
def test_the_cache_of_a_bidirectional_model_holds_the_last_prefill(toy, prompts, cache, alignment):
    """Against a plain loop: all keys and values are those of the prefill with which the block began, except at the
    positions that are recomputed."""
    model, prompt, size = toy("bidirectional", alignment, depth=1), prompts[1], 8
    sample = model.continued([prompt], 10, block=size, unmasking="left_to_right", cache=cache)[0]
    tokens, masked = np.array([*prompt, *[0] * 10]), np.arange(16) >= 6
    for begin in (6, 6 + size):
        prefilled = np.where(masked, MASK, tokens)  # with one layer, keys and values depend on the token alone
        while masked[begin:begin + size].any():
            now = np.where(masked, MASK, tokens)
            fresh = np.arange(16) >= begin if cache == "prefix" else np.isin(np.arange(16), range(begin, begin + size))
            mixed = np.where(fresh, now, prefilled)
            logits = np.array(model.logits(mixed[None]))[0]
            logits = np.concatenate([logits[:1], logits[:-1]]) if alignment == "shifted" else logits
            if alignment == "shifted" and begin:  # the output before the block is that of the prefill
                logits[begin] = np.array(model.logits(prefilled[None]))[0, begin - 1]
            logits[:, MASK] = -np.inf
            position = begin + int(np.argmax(masked[begin:begin + size]))
            tokens[position], masked[position] = logits[position].argmax(), False
    assert sample.tokens == tokens.tolist()


@pytest.mark.parametrize("cache", ("none", "prefix", "dual"))
def test_a_bidirectional_model_fills_its_blocks_in_order(toy, prompts, cache):
    for sample in toy("bidirectional").continued(prompts, 20, block=8, cache=cache):
        first = sum(step == 0 for step in sample.commit_step)
        steps = [sample.commit_step[begin:begin + 8] for begin in range(first, len(sample.tokens), 8)]
        assert all(max(a) < min(b) for a, b in zip(steps, steps[1:]))
        assert sample.nfe == sum(map(len, steps))  # the prefill is the first step of a block


def test_the_cache_is_not_copied_at_each_step(toy):
    """The compiled loop holds the cache and the layer being read, but no second cache."""
    lm = toy("block_causal", "same_position", 4, depth=60, max_length=512)
    canvas = make_canvas([Request([1] * 400, [False] * 200 + [True] * 200, False)], 512, 8)
    sampler = Sampler(jnp.ones(8, jnp.int32), jnp.full(8, -1), Proposal(), parse_unmasking("threshold:0.9"),
                      CACHES["block"], 4)
    program = run.lower(lm.params, canvas, jax.random.split(jax.random.key(0), 8), sampler, config=lm.config,
                        spec=lm.spec).compile()
    cache = 2 * 60 * 8 * 512 * 2 * 6 * 4  # keys and values in fp32, 23 MB; the scores of the prefill take 4 MB
    assert program.memory_analysis().temp_size_in_bytes < 1.4 * cache


@pytest.mark.parametrize("rule,block,settings,words", (
    ("block_causal", 4, {"cache": "dual"}, "bidirectional models"),
    ("bidirectional", None, {"cache": "block"}, "block_causal models"),
    ("bidirectional", None, {"cache": "dual"}, "number of positions per block"),
    ("block_causal", 4, {"block": 8}, "blocks of 4, not of 8"),
    ("bidirectional", None, {"cache": "dull"}, "not a cache"),
    ("bidirectional", None, {"block": 0}, "at least 1"),
))
def test_a_cache_that_does_not_fit_the_model_is_refused(toy, rule, block, settings, words):
    with pytest.raises(UserError, match=words):
        toy(rule, "same_position", block).continued([[1, 2]], 4, **settings)
