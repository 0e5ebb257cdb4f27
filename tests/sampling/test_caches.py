"""What a cache may change: for block-causal models nothing, for the others what is measured here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.rules import BlockDiffusion
from dlm_jax.errors import UserError
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.sampling.engine import run
from dlm_jax.sampling.generate import make_canvas
from dlm_jax.sampling.order import parse_order
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.reading import CACHES, Model, empty_memory, read_block, read_whole
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.trace import Sampler

MASK = 30
HALVES = ("block_causal", "token_causal")


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("order,temperature", (("threshold:0.3", 0.0), ("random", 1.0)))
def test_cached_is_uncached_token_for_token(toy, prompts, half, order, temperature):
    model = toy("block_causal", "shifted", 4, half=half)
    how = {"order": order, "temperature": temperature, "steps": 3}
    cached, uncached = (model.continued(prompts, 13, cache=cache, **how) for cache in ("block", "none"))
    if temperature == 0:
        assert [s.tokens for s in cached] == [s.tokens for s in uncached]
    for a, b in zip(cached, uncached, strict=True):
        blocks = -(-len(a.tokens) // 4) - sum(step == 0 for step in a.order) // 4
        assert a.forwards == b.forwards + blocks - 1 or temperature  # a finished block is read once more, clean


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
def test_two_stream_training_logits_are_cached_decoding_logits(toy, half, alignment):
    """Block by block: the finished text is in the cache, and the block is read with some of its places masked."""
    lm, n, size = toy("block_causal", alignment, 4, half=half), 16, 4
    random = np.random.default_rng(0)
    clean = random.integers(0, 30, (2, n))
    noisy = np.where(random.random((2, n)) < 0.6, MASK, clean)
    two = jax.jit(lambda p, x: unembed(p, forward(p, x, config=lm.config, rule=BlockDiffusion(n, size, half)),
                                       lm.config))(lm.params, np.concatenate([noisy, clean], 1))
    model = Model(lm.params, jnp.ones((2, n), jnp.int32), lm.config, lm.card, size)
    memory = empty_memory(model, CACHES["block"])

    @functools.partial(jax.jit, static_argnames="read")
    def logits(tokens, start, clean, memory, read):
        hidden, before, memory = read(model, tokens, start, clean, memory)
        return unembed(model.params, hidden, lm.config), unembed(model.params, before, lm.config), memory

    for start in range(0, n, size):
        at, read = jnp.full(2, start), read_block if start else read_whole
        canvas = np.concatenate([clean[:, :start], noisy[:, start:]], 1)
        found, before, memory = logits(canvas, at, at, memory, read)
        np.testing.assert_allclose(found, two[:, start:start + size], atol=1e-4)
        if start:  # the first token of a block is predicted, in a shifted model, by the clean output before it
            np.testing.assert_allclose(before, two[:, n + start - 1], atol=1e-4)
        _, _, memory = logits(clean, at, at + size, memory, read_block)


def test_the_cache_of_a_bidirectional_model_is_exact_until_something_is_committed(toy, prompts):
    """A block whose places are all committed in its first step never reads what the cache has kept."""
    model = toy("bidirectional", "same_position")
    exact, *approximate = (model.continued(prompts, 16, block=8, steps=1, cache=cache)
                           for cache in ("none", "prefix", "dual"))
    for samples in approximate:
        assert [s.tokens for s in samples] == [s.tokens for s in exact]
        assert [s.forwards for s in samples] == [s.forwards for s in exact]


@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
@pytest.mark.parametrize("cache", ("prefix", "dual"))
def test_the_cache_of_a_bidirectional_model_says_what_a_stale_reading_says(toy, prompts, cache, alignment):
    """Against a plain loop: all keys and values are those of the reading with which the block began, but for the
    places that are read again."""
    model, prompt, size = toy("bidirectional", alignment, depth=1), prompts[1], 8
    sample = model.continued([prompt], 10, block=size, order="left", cache=cache)[0]
    tokens, masked = np.array([*prompt, *[0] * 10]), np.arange(16) >= 6
    for begin in (0, size):
        shown = np.where(masked, MASK, tokens)  # with one layer, keys and values depend on the token alone
        while masked[begin:begin + size].any():
            now = np.where(masked, MASK, tokens)
            fresh = np.arange(16) >= begin if cache == "prefix" else np.isin(np.arange(16) // size, begin // size)
            mixed = np.where(fresh, now, shown)
            logits = np.array(model.logits(mixed[None]))[0]
            logits = np.concatenate([logits[:1], logits[:-1]]) if alignment == "shifted" else logits
            if alignment == "shifted" and begin:  # the output before the block is that of the first reading
                logits[begin] = np.array(model.logits(shown[None]))[0, begin - 1]
            logits[:, MASK] = -np.inf
            place = begin + int(np.argmax(masked[begin:begin + size]))
            tokens[place], masked[place] = logits[place].argmax(), False
    assert sample.tokens == tokens.tolist()


@pytest.mark.parametrize("cache", ("none", "prefix", "dual"))
def test_blocks_of_a_bidirectional_model_are_filled_one_after_the_other(toy, prompts, cache):
    for sample in toy("bidirectional").continued(prompts, 20, block=8, cache=cache):
        steps = [[step for step in sample.order[begin:begin + 8] if step] for begin in range(0, len(sample.tokens), 8)]
        steps = [block for block in steps if block]
        assert all(max(a) < min(b) for a, b in zip(steps, steps[1:]))
        assert sample.forwards == sum(map(len, steps))  # the reading of the whole canvas is the first step of a block


def test_the_cache_is_not_copied_at_each_step(toy):
    """The compiled loop holds the cache, and the layer that is read, and not a second cache."""
    lm = toy("block_causal", "same_position", 4, depth=60, max_length=512)
    canvas = make_canvas([Request([1] * 400, [False] * 200 + [True] * 200, False)], lm.config, 4, 8)
    sampler = Sampler(jnp.ones(8, jnp.int32), jnp.full(8, -1), Proposal(), parse_order("threshold:0.9"),
                      CACHES["block"], 4)
    program = run.lower(lm.params, canvas, jax.random.split(jax.random.key(0), 8), sampler, config=lm.config,
                        card=lm.card).compile()
    cache = 2 * 60 * 8 * 512 * 2 * 6 * 4  # keys and values in fp32, 23 MB; 4 MB are the scores of the prefill
    assert program.memory_analysis().temp_size_in_bytes < 1.4 * cache


@pytest.mark.parametrize("rule,block,settings,said", (
    ("block_causal", 4, {"cache": "dual"}, "bidirectional models"),
    ("bidirectional", None, {"cache": "block"}, "block_causal models"),
    ("bidirectional", None, {"cache": "dual"}, "how many places"),
    ("block_causal", 4, {"block": 8}, "blocks of 4 and not of 8"),
    ("bidirectional", None, {"cache": "dull"}, "not a cache"),
    ("bidirectional", None, {"block": 0}, "at least 1"),
))
def test_a_cache_that_is_for_other_models_is_refused(toy, rule, block, settings, said):
    with pytest.raises(UserError, match=said):
        toy(rule, "same_position", block).continued([[1, 2]], 4, **settings)
