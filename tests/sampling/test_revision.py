"""Second thoughts: tokens that are masked again or replaced, and that it all comes to an end."""

import dataclasses

import numpy as np
import pytest

from dlm_jax.sampling.requests import Request


@pytest.mark.parametrize("rule,block", (("bidirectional", None), ("block_causal", 4)))
def test_remasking_everything_masks_each_place_once_more_and_ends(toy, prompts, rule, block):
    seen = []
    model = toy(rule, "same_position", block)
    samples = model.continued(prompts, 8, order="left+remask:1", callback=seen.append)
    assert [s.new_tokens for s in samples] == [8, 8, 8]
    again = np.array(seen[-1].again)[:3]
    assert again.sum(1).max() <= 8 and again.sum() > 8  # of a block, the last step's own tokens are not looked at again
    plain = model.continued(prompts, 8, order="left")
    assert all(a.forwards > b.forwards for a, b in zip(samples, plain))


def test_revisions_that_never_apply_change_nothing(toy, prompts):
    model = toy("bidirectional", "same_position")
    plain, revised = (model.continued(prompts, 12, order=order) for order in
                      ("threshold:0.3", "threshold:0.3+remask:0+edit:1"))
    assert plain == revised


def test_editing_puts_the_surer_token_in_place_and_leaves_given_tokens_alone(toy, prompts):
    seen = []
    model = toy("bidirectional", "same_position")
    sample = model.continued(prompts[1:2], 16, order="left+edit:0", callback=seen.append)[0]
    assert sample.tokens[:6] == prompts[1] and sample.order[:6] == [0] * 6
    last = dataclasses.replace(seen[-2])  # before the last step: every place but one is written
    tokens = np.where(last.masked, 30, last.tokens)[0, :22]
    best = np.array(model.logits(tokens[None]))[0]
    best[:, 30] = -np.inf
    assert sample.tokens[6:] == best.argmax(-1)[6:].tolist()


def test_a_text_without_a_second_thought_is_written_once(toy):
    request = Request([1, 0, 0, 2], [False, True, True, False], stop=False)
    sample = toy("bidirectional", "same_position").filled([request])[0]
    assert sorted(sample.order) == [0, 0, 1, 2]
