"""Self-speculation is lossless: the text is that of autoregressive decoding of the same model, token for token."""

import dataclasses
import json

import pytest

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.models.card import Card
from dlm_jax.sampling.requests import Request


def autoregressive(model):
    """The causal half by itself."""
    card = dataclasses.replace(model.card, rule="causal", alignment="shifted", block_size=None,
                               clean_half="block_causal")
    return dataclasses.replace(model, card=card)


@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("block", (1, 4, 7))
def test_speculation_is_autoregressive_decoding_token_for_token(toy, prompts, alignment, temperature, block):
    model = toy("block_causal", alignment, block, half="token_causal")
    expected = autoregressive(model).continued(prompts, 20, temperature=temperature)
    samples = model.continued(prompts, 20, order="speculate", temperature=temperature)
    assert [s.tokens for s in samples] == [s.tokens for s in expected]
    if block > 1:
        assert all(s.forwards <= 2 * 20 for s in samples)  # at worst a draft and a reading for each token


def test_speculation_is_lossless_on_stories_over_200_prompts_and_says_how_many_tokens_a_pass_gives(shared):
    """On a trained base, whose drafts from masked places are poor: what is lossless is so for any weights."""
    stories = dlm_jax.load(shared / "stories260k").with_mask()
    card = Card("shifted", "block_causal", 8, stories.card.mask_token_id, stories.card.bos_token_id,
                stories.card.eos_token_id, clean_half="token_causal")
    model = dataclasses.replace(stories, card=card)
    lines = (shared / "tinystories" / "tinystories_val.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    prompts = [" ".join(json.loads(line)["text"].split()[:4 + i % 9]) for i, line in enumerate(lines)]
    expected = autoregressive(stories).sample(prompts, max_tokens=40)
    samples = model.sample(prompts, max_tokens=40, order="speculate")
    assert len(samples) == 200 and [s.tokens for s in samples] == [s.tokens for s in expected]
    rate = sum(s.new_tokens for s in samples) / sum(s.forwards for s in samples)
    assert 0.5 <= rate <= 8 and samples[0].tokens_per_forward == samples[0].new_tokens / samples[0].forwards


def test_speculation_keeps_nothing_after_an_end(toy, prompts):
    free = toy("block_causal", "shifted", 4, half="token_causal").continued(prompts, 20, order="speculate")
    end = free[0].tokens[9]
    stopped = toy("block_causal", "shifted", 4, half="token_causal", eos=end).continued(prompts, 20, order="speculate")
    for a, b, prompt in zip(stopped, free, prompts, strict=True):
        place = b.tokens.index(end, len(prompt)) + 1 if end in b.tokens[len(prompt):] else len(b.tokens)
        assert a.tokens == b.tokens[:place]


def test_a_perfect_draft_gives_a_block_for_two_passes(toy, prompts):
    """A model whose next token is the last one again: every guess is right."""
    model = toy("block_causal", "shifted", 4, half="token_causal")
    constant = {**model.params, "final_norm": {"scale": model.params["final_norm"]["scale"] * 0}}
    sample = dataclasses.replace(model, params=constant).continued([[1, 2, 3, 4]], 17, order="speculate")[0]
    # the prefill gives place 4; each block of four then takes a draft and a reading, which gives the next one's first
    assert sample.forwards == 1 + 2 * 4


def test_what_cannot_be_written_left_to_right_is_refused(toy):
    hole = Request([1, 0, 2], [False, True, False], stop=False)
    with pytest.raises(UserError, match="token_causal"):
        toy("block_causal", "shifted", 4).continued([[1]], 3, order="speculate")
    with pytest.raises(UserError, match="token_causal"):
        toy("bidirectional").continued([[1]], 3, order="speculate")
    for model in (toy("block_causal", "shifted", 4, half="token_causal"), toy("causal")):
        with pytest.raises(UserError, match="left to right"):
            model.filled([hole], order="speculate")
