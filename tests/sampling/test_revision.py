"""Revisions: tokens that are masked again or replaced, and that sampling still terminates."""

import dataclasses

import numpy as np
import pytest

from dlm_jax.sampling.requests import Request


@pytest.mark.parametrize("rule,block", (("bidirectional", None), ("block_causal", 4)))
def test_remasking_everything_masks_each_position_once_more_and_terminates(toy, prompts, rule, block):
    seen = []
    model = toy(rule, "same_position", block)
    samples = model.continued(prompts, 8, unmasking="left_to_right+remask:1", callback=seen.append)
    assert [s.new_tokens for s in samples] == [8, 8, 8]
    remasked = np.array(seen[-1].remasked)[:3]
    assert remasked.sum(1).max() <= 8 and remasked.sum() > 8  # tokens of a block's last step are not revised
    plain = model.continued(prompts, 8, unmasking="left_to_right")
    assert all(a.nfe > b.nfe for a, b in zip(samples, plain))


def test_revisions_that_never_apply_change_nothing(toy, prompts):
    model = toy("bidirectional", "same_position")
    plain, revised = (model.continued(prompts, 12, unmasking=unmasking) for unmasking in
                      ("threshold:0.3", "threshold:0.3+remask:0+edit:1"))
    assert plain == revised


def test_editing_writes_the_more_confident_token_and_leaves_the_prompt_alone(toy, prompts):
    seen = []
    model = toy("bidirectional", "same_position")
    sample = model.continued(prompts[1:2], 16, unmasking="left_to_right+edit:0", callback=seen.append)[0]
    assert sample.tokens[:6] == prompts[1] and sample.commit_step[:6] == [0] * 6
    last = dataclasses.replace(seen[-2])  # before the last step: all positions but one are written
    tokens = np.where(last.masked, 30, last.tokens)[0, :22]
    best = np.array(model.logits(tokens[None]))[0]
    best[:, 30] = -np.inf
    assert sample.tokens[6:] == best.argmax(-1)[6:].tolist()


def test_without_revisions_each_position_is_written_once(toy):
    request = Request([1, 0, 0, 2], [False, True, True, False], stop=False)
    sample = toy("bidirectional", "same_position").filled([request])[0]
    assert sorted(sample.commit_step) == [0, 0, 1, 2]
