"""The engine against simple loops: no cache, no batch, one sequence, in Python.

Most tests sample three prompts on a canvas of one length, so that they share compilations.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.rules import Bidirectional, BlockCausal, Causal, CausalThenLastBlock
from dlm_jax.errors import UserError
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.sampling.engine import block_steps
from dlm_jax.sampling.requests import Request

MASK = 30
POSITIONS = 40
ALIGNMENTS = ("same_position", "shifted")


@functools.partial(jax.jit, static_argnames="config")
def padded_logits(params, tokens, segments, rule, config):
    return unembed(params, forward(params, tokens, config=config, rule=rule, segments=segments), config)


def all_logits(model, tokens, rule):
    """The logits of one sequence: float [n, v]. It is padded, so that all lengths share a compilation."""
    n = len(tokens)
    padding = (0, POSITIONS - n)
    tokens, segments = np.pad(tokens, padding)[None], np.pad(np.ones(n, np.int32), padding)[None]
    return np.array(padded_logits(model.params, tokens, segments, rule, model.config)[0, :n], np.float64)


def predictions(model, tokens, masked, rule):
    """The logits for each position of one sequence with its holes masked: float [n, v]."""
    logits = all_logits(model, np.where(masked, MASK, tokens), rule)
    if model.spec.alignment == "shifted":
        logits = np.concatenate([np.zeros_like(logits[:1]), logits[:-1]])
    logits[:, MASK] = -np.inf
    return logits


def probability(logits):
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)).max(-1)


def fill(model, tokens, masked, rule, positions, steps=64, tau=None):
    """Fills the holes in the slice `positions`, in place: evenly in `steps`, or by the threshold `tau`. Returns the
    steps taken."""
    steps_taken = 0
    while left := masked[positions].sum():
        logits = predictions(model, tokens, masked, rule)
        confidence = np.where(masked[positions], probability(logits)[positions], -1)
        ranked = np.argsort(-confidence, kind="stable")
        chosen = ranked[:-(-left // max(steps - steps_taken, 1))]
        if tau is not None:
            chosen = sorted({ranked[0], *np.flatnonzero(confidence > tau)})
        where = np.arange(positions.start, positions.stop)[chosen]
        tokens[where], masked[where] = logits[where].argmax(-1), False
        steps_taken += 1
    return steps_taken


def uncached(model, prompt, new, size, steps=64, tau=None):
    """Fills blocks of `size` in order, each with its share of the steps; every step is a full forward pass over the
    text up to the end of the block. Returns (tokens, steps of each block)."""
    tokens = np.array([*prompt, *[0] * new])
    masked = np.arange(len(tokens)) >= len(prompt)
    rule = {"block_causal": BlockCausal, "token_causal": CausalThenLastBlock}[model.spec.clean_half](size)
    ends = [min(start + size, len(tokens)) for start in range(0, len(tokens), size)]
    shares = [math.ceil(steps * int(masked[number * size:end].sum()) / new) for number, end in enumerate(ends)]
    steps = [fill(model, tokens[:end], masked[:end], rule, slice(number * size, end), share, tau)
             for number, (end, share) in enumerate(zip(ends, shares))]
    return tokens.tolist(), steps + [0] * (8 - len(steps))


def test_autoregressive_decoding_is_the_argmax_of_repeated_full_forward_passes(toy, prompts):
    model = toy("causal", family="gpt2", max_length=POSITIONS)  # the canvas of 64 is longer than the context
    for prompt, sample in zip(prompts, model.continued(prompts, 31), strict=True):
        tokens = np.array([*prompt, *[0] * 31])
        for n in range(len(prompt), len(tokens)):
            tokens[n] = all_logits(model, tokens, Causal())[n - 1].argmax()
        assert sample.tokens == tokens.tolist()


def test_autoregressive_decoding_takes_one_forward_pass_per_token(toy, prompts):
    samples = toy("causal").continued(prompts, 5)
    assert [sample.nfe for sample in samples] == [5, 5, 5]  # the prefill gives the first token
    assert samples[0].commit_step == [0] * 3 + [1, 2, 3, 4, 5] and samples[0].new_tokens == 5


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("unmasking", ("confidence", "threshold:0.3"))
@pytest.mark.parametrize("half", ("block_causal", "token_causal"))
def test_cached_blocks_equal_uncached_ones_token_for_token(toy, prompts, alignment, unmasking, half):
    model = toy("block_causal", alignment, 4, half=half)
    for steps in (11, 6):
        how = {"tau": 0.3} if unmasking == "threshold:0.3" else {"steps": steps}
        expected = [uncached(model, prompt, 11, 4, **how) for prompt in prompts]
        samples = model.continued(prompts, 11, unmasking=unmasking, steps=steps)
        assert [sample.tokens for sample in samples] == [tokens for tokens, _ in expected]
        for sample, (_, steps_taken) in zip(samples, expected, strict=True):
            # each block's steps, and one forward pass between blocks
            assert sample.nfe == sum(n + 1 for n in steps_taken if n) - 1
        assert samples[0].cost.batch_nfe == max(sample.nfe for sample in samples)


def test_blocks_work_when_the_canvas_is_longer_than_the_position_table(toy, prompts):
    model = toy("block_causal", "shifted", 4, family="gpt2", max_length=POSITIONS)
    for prompt, sample in zip(prompts, model.continued(prompts, 31), strict=True):
        assert sample.tokens == uncached(model, prompt, 31, 4)[0]


def test_blocks_of_one_token_equal_autoregressive_decoding(toy, prompts):
    blocks, plain = toy("block_causal", "shifted", 1), toy("causal")
    plain = dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, mask_token_id=MASK))
    for a, b in zip(blocks.continued(prompts, 8), plain.continued(prompts, 8), strict=True):
        assert a.tokens == b.tokens


def test_a_hole_inside_a_text_sees_the_rest_of_its_block_and_everything_before(toy):
    model = toy("block_causal", "same_position", 4)
    text = np.random.default_rng(1).integers(0, 30, 14)
    masked = np.isin(np.arange(14), (5, 6, 12))
    expected, left = text.copy(), masked.copy()
    for start in (4, 12):
        fill(model, expected, left, BlockCausal(4), slice(start, min(start + 4, 14)))
    sample = model.filled([Request(text.tolist(), masked.tolist(), stop=False)] * 3)[0]
    assert sample.tokens == expected.tolist()
    assert sample.nfe == (2 + 1) + 1 + 1  # the block between is recomputed, because its past has changed


def test_threshold_one_commits_one_token_per_forward_pass_and_threshold_zero_one_block(toy, prompts):
    model = toy("block_causal", "same_position", 4)
    slow, fast = (model.continued(prompts[1:2], 10, unmasking=f"threshold:{tau}", steps=1)[0] for tau in (1.0, 0))
    # 6 + 10 tokens: 2, 4 and 4 positions to fill
    assert slow.nfe == (2 + 1) + (4 + 1) + 4 and sorted(slow.commit_step) == [0] * 6 + list(range(1, 11))
    assert fast.nfe == 3 + 2 and fast.commit_step[6:] == [1] * 2 + [2] * 4 + [3] * 4  # three blocks, two of them cached


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("tau", (None, 0.3))
def test_one_stream_is_the_same_loop_under_full_visibility(toy, prompts, alignment, tau):
    model = toy("bidirectional", alignment)
    expected_nfe = []
    samples = model.continued(prompts, 10, steps=4, unmasking=f"threshold:{tau}" if tau else "confidence")
    for prompt, sample in zip(prompts, samples, strict=True):
        tokens, masked = np.array([*prompt, *[0] * 10]), np.array([False] * len(prompt) + [True] * 10)
        expected_nfe.append(fill(model, tokens, masked, Bidirectional(), slice(0, len(tokens)), 4, tau))
        assert sample.tokens == tokens.tolist()
    assert [sample.nfe for sample in samples] == expected_nfe


@pytest.mark.parametrize("new,steps,nfe", ((12, 5, 5), (12, 12, 12), (3, 7, 3), (12, 1, 1), (12, None, 12)))
def test_confidence_finishes_in_exactly_the_steps_asked_for(toy, prompts, new, steps, nfe):
    sample = toy("bidirectional").continued(prompts, new, steps=steps)[0]
    assert sample.nfe == nfe and set(sample.commit_step) == set(range(nfe + 1))


@pytest.mark.parametrize("rule,block,unmasking", (("bidirectional", None, "random"),
                                              ("bidirectional", None, "threshold:0.5"),
                                              ("block_causal", 4, "confidence")))
def test_the_mask_is_never_emitted_and_the_prompt_never_changes(toy, prompts, rule, block, unmasking):
    model = toy(rule, "same_position", block)
    for prompt, sample in zip(prompts, model.continued(prompts, 20, unmasking=unmasking, temperature=3.0), strict=True):
        assert sample.tokens[:len(prompt)] == prompt and MASK not in sample.tokens
        assert [step > 0 for step in sample.commit_step] == [False] * len(prompt) + [True] * 20
        assert [c > 0 for c in sample.confidence] == [False] * len(prompt) + [True] * 20


def test_an_adapted_model_decoded_left_to_right_does_not_emit_its_mask(toy):
    plain = toy("causal")
    mask = plain.continued([[1, 2]] * 3, 6)[0].tokens[2]
    model = dataclasses.replace(plain, spec=dataclasses.replace(plain.spec, mask_token_id=mask))
    prompt = [1, 2] if mask > 2 else [3, 4]
    assert mask not in model.continued([prompt] * 3, 20)[0].tokens


@pytest.mark.parametrize("unmasking", ("confidence", "threshold:0.3"))
def test_a_model_with_nan_weights_still_terminates(toy, prompts, unmasking):
    model = toy("bidirectional", "same_position")
    broken = {**model.params, "final_norm": {"scale": np.full(16, np.nan, np.float32)}}
    assert dataclasses.replace(model, params=broken).continued(prompts, 4, unmasking=unmasking)[0].new_tokens == 4


def llada(model, prompt, new, block, steps, cfg_scale=0.0):
    """Low-confidence remasking block by block, counted from the end of the prompt, as LLaDA's sampler does it: each
    block gets steps / blocks of the steps, and the first of these the remainder of its tokens."""
    tokens, length = np.array([*prompt, *[MASK] * new]), len(prompt)
    for start in range(length, length + new, block):
        per_step, more = divmod(block, steps * block // new)
        for step in range(steps * block // new):
            found = predictions(model, tokens, tokens == MASK, Bidirectional())
            if cfg_scale:
                no_prompt = (tokens == MASK) | (np.arange(len(tokens)) < length)
                blank = np.nan_to_num(predictions(model, tokens, no_prompt, Bidirectional()))
                found = blank + (cfg_scale + 1) * (np.nan_to_num(found) - blank)
            found[:, MASK] = -np.inf
            is_open = (tokens == MASK) & (np.arange(len(tokens)) < start + block)
            ranked = np.argsort(-np.where(is_open, probability(found), -np.inf), kind="stable")
            chosen = ranked[:per_step + (step < more)]
            tokens[chosen] = found[chosen].argmax(-1)
    return tokens.tolist()


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("cfg_scale", (0.0, 1.5))
def test_blocks_of_a_bidirectional_model_give_the_tokens_and_the_passes_of_lladas_sampler(toy, prompts, alignment,
                                                                                         cfg_scale):
    model = toy("bidirectional", alignment)
    samples = model.continued(prompts, 24, block=8, steps=9, cfg_scale=cfg_scale)
    assert [s.tokens for s in samples] == [llada(model, prompt, 24, 8, 9, cfg_scale) for prompt in prompts]
    assert {sample.nfe for sample in samples} == {18 if cfg_scale else 9}


def test_a_partial_block_takes_its_share_of_the_steps(toy, prompts):
    for sample in toy("bidirectional").continued(prompts, 20, block=8, steps=10):
        first = sum(step == 0 for step in sample.commit_step)
        assert [max(sample.commit_step[start:start + 8]) for start in range(first, first + 20, 8)] == [4, 8, 10]


def test_blocks_share_the_steps_by_what_they_have_to_fill_rounded_up():
    def steps(total, in_block, in_all):
        row = jnp.arange(8)[None]
        return int(block_steps(jnp.array([total]), row < in_block, row < in_all)[0])

    assert [steps(5, 1, 1), steps(5, 2, 8), steps(8, 2, 8), steps(9, 3, 8), steps(5, 0, 0)] == [5, 2, 2, 4, 0]


def test_no_strategy_takes_more_steps_than_there_are_holes(toy):
    holes = Request([1, 2, 0, 4, 0, 6, 7], [False, False, True, False, True, False, False], stop=False)
    for unmasking in ("random", "confidence", "entropy"):
        for rule, block in (("bidirectional", None), ("block_causal", 4)):
            for steps in (None, 32):
                sample = toy(rule, "shifted", block).filled([holes], unmasking=unmasking, steps=steps)[0]
                assert sample.new_tokens == 2 and max(sample.commit_step) <= 2


def test_random_commits_equal_numbers_in_an_order_that_the_seed_decides(toy, prompts):
    first, again, other = ([s.commit_step[len(p):] for s, p in zip(
        toy("bidirectional").continued(prompts, 12, unmasking="random", steps=6, seed=seed), prompts)]
        for seed in (0, 0, 1))
    assert first == again != other and all(row.count(step) == 2 for row in first for step in range(1, 7))


def test_suppressed_tokens_are_never_written(toy, prompts):
    model = toy("bidirectional")
    written = {t for s, p in zip(model.continued(prompts, 12), prompts) for t in s.tokens[len(p):]}
    for rule, block in (("bidirectional", None), ("block_causal", 4), ("causal", None)):
        samples = toy(rule, "shifted", block).continued(prompts, 12, suppress_tokens=tuple(written))
        assert not written & {t for s, p in zip(samples, prompts) for t in s.tokens[len(p):]}


@pytest.mark.parametrize("rule,block,settings,words", (
    ("bidirectional", None, {"cfg_scale": -1.0}, "cfg_scale must lie in"),
    ("block_causal", 4, {"cfg_scale": 1.0, "cache": "block"}, "leave out cache"),
    ("causal", None, {"cfg_scale": 1.0}, "left to right; leave out cfg_scale"),
    ("bidirectional", None, {"suppress_tokens": (31,)}, "ids from 0 to 30"),
    ("bidirectional", None, {"suppress_tokens": tuple(range(30))}, "no token to write"),
))
def test_guidance_and_suppression_that_do_not_fit_are_refused(toy, rule, block, settings, words):
    with pytest.raises(UserError, match=words):
        toy(rule, "shifted", block).continued([[1, 2]], 4, **settings)
