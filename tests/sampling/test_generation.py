"""From requests to samples: keys, batches, the end token, and what is refused."""

import dataclasses

import numpy as np
import pytest

from dlm_jax.errors import UserError
from dlm_jax.sampling import generation
from dlm_jax.sampling.engine import run
from dlm_jax.sampling.requests import Request, continuation

WAYS = (("causal", "shifted", None), ("bidirectional", "same_position", None), ("block_causal", "shifted", 4))


def written(samples):
    return [sample.tokens for sample in samples]


@pytest.mark.parametrize("rule,alignment,block", WAYS)
def test_a_sequence_depends_neither_on_its_batch_nor_on_padding(toy, prompts, rule, alignment, block):
    model = toy(rule, alignment, block)
    how = {"unmasking": "random", "temperature": 1.0}
    requests = [continuation(prompt, 9) for prompt in prompts]
    long = continuation([1] * 20, 25)  # doubles the canvas
    [alone] = model.filled(requests[:1], **how)
    samples = model.filled([*requests[:2], long], **how)
    assert samples[0].tokens == alone.tokens
    others = model.filled([long, requests[1], requests[2]], **how)
    assert others[1].tokens == samples[1].tokens and others[2].tokens != samples[2].tokens


def test_the_same_seed_gives_the_same_texts_and_another_seed_does_not(toy, prompts):
    model = toy("bidirectional")
    first, again, other = (written(model.continued([[1, 2]] * 3, 10, unmasking="random", temperature=1.0, seed=seed))
                           for seed in (0, 0, 1))
    assert first == again != other
    assert first[0] != first[1]  # equal requests of a batch draw independently


@pytest.mark.parametrize("rule,alignment,block", WAYS)
def test_nothing_follows_a_committed_end_token(toy, prompts, rule, alignment, block):
    free = toy(rule, alignment, block).continued(prompts[1:2] * 3, 18)[0]
    end = free.tokens[10]  # of 6 + 18; first committed here or before
    stopped = toy(rule, alignment, block, eos=end).continued(prompts[1:2] * 3, 18)[0]
    position = free.tokens.index(end, 6)
    assert stopped.tokens == free.tokens[:position + 1]
    assert len(stopped.commit_step) == len(stopped.confidence) == position + 1
    if rule != "bidirectional":
        assert stopped.nfe < free.nfe  # nothing after the end is decoded


def test_sequences_that_have_not_ended_continue(toy, prompts):
    free = toy("block_causal", "shifted", 4).continued(prompts, 18)
    end = free[0].tokens[4]
    stopped = toy("block_causal", "shifted", 4, eos=end).continued(prompts, 18)
    for a, b, prompt in zip(stopped, free, prompts, strict=True):
        assert a.tokens == b.tokens[:len(a.tokens)]
        ends = end in b.tokens[len(prompt):]
        assert len(a.tokens) == (b.tokens.index(end, len(prompt)) + 1 if ends else len(b.tokens))


def test_an_end_token_in_the_prompt_stops_nothing(toy):
    free = toy("block_causal", "shifted", 4).continued([[3, 4, 5]] * 3, 10)[0]
    end = next(token for token in range(30) if token not in free.tokens)
    model = toy("block_causal", "shifted", 4, eos=end)
    samples = model.continued([[3, end, 5]] * 3, 3)
    assert [sample.new_tokens for sample in samples] == [3] * 3 or end in samples[0].tokens[3:]


def test_a_hole_may_hold_the_end_token(toy):
    request = Request([1, 2, 0, 0, 0, 0, 3, 4], [False] * 2 + [True] * 4 + [False] * 2, stop=False)
    free = toy("bidirectional").filled([request] * 3)[0]
    assert toy("bidirectional", eos=free.tokens[2]).filled([request] * 3)[0].tokens == free.tokens


def test_lengths_and_steps_share_a_compilation(toy):
    model = toy("bidirectional", width=12)  # a model of its own
    before = run._cache_size()
    for length in range(1, 11):
        model.continued([[1] * length], 20 - length, steps=length)
        model.continued([[1] * length], 3 * length)
    assert run._cache_size() - before <= 2


REFUSED = {
    "no hole": Request([1, 2], [False, False], False),
    "context": Request([1] * 65, [False] * 64 + [True], True),
    "mask token": Request([1, 30, 0], [False, False, True], True),
    "vocabulary": Request([1, 31, 0], [False, False, True], True),
    "before the hole": Request([0, 1], [True, False], True),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_request_that_cannot_be_served_is_refused_with_its_cause(toy, words):
    with pytest.raises(UserError, match=words):
        toy("bidirectional").filled([REFUSED[words]])


def test_a_diffusion_model_without_a_mask_token_is_refused(toy):
    model = toy("bidirectional")
    with pytest.raises(UserError, match="names no mask"):
        dataclasses.replace(model, spec=dataclasses.replace(model.spec, mask_token_id=None)).continued([[1]], 2)


def test_a_hole_at_the_very_start_needs_same_position_alignment(toy):
    sample = toy("bidirectional", "same_position").filled([REFUSED["before the hole"]] * 3)[0]
    assert sample.commit_step == [1, 0] and sample.tokens[1] == 1


def test_counts_below_one_are_refused_and_no_request_gives_no_sample(toy):
    with pytest.raises(UserError, match="max_tokens"):
        continuation([1], 0)
    with pytest.raises(UserError, match="steps"):
        toy("bidirectional").continued([[1]], 4, steps=0)
    assert toy("bidirectional").filled([]) == []


def test_sizes_of_holes_are_kept(toy):
    model = toy("bidirectional", "same_position")
    text = np.arange(1, 21).tolist()
    masked = [position in (0, 4, 5, 6, 12, 19) for position in range(20)]
    sample = model.filled([Request(text, masked, False)] * 3)[0]
    assert [step > 0 for step in sample.commit_step] == masked
    assert [a for a, hole in zip(sample.tokens, masked) if not hole] == [a for a, hole in zip(text, masked) if not hole]


@pytest.mark.parametrize("half", ("block_causal", "token_causal"))
def test_what_is_prefilled_of_a_block_causal_model_changes_no_token(toy, prompts, half, monkeypatch):
    model = toy("block_causal", "shifted", 4, half=half)
    settings = [{}, {"unmasking": "speculate"}] if half == "token_causal" else [{}]
    found = [[sample.tokens for sample in model.continued(prompts, 40, **each)] for each in settings]
    assert generation.prompt_length([Request([0] * 41, [False] * 20 + [True] * 21, False)], 4, 64) == 32
    monkeypatch.setattr(generation, "prompt_length", lambda requests, block_size, length: 0)  # the whole canvas
    assert found == [[sample.tokens for sample in model.continued(prompts, 40, **each)] for each in settings]
