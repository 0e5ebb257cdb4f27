"""Self-speculation is lossless: the text equals autoregressive decoding of the same model, token for token."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.speculation import agreed_prefix


def autoregressive(model):
    """The causal half on its own."""
    spec = dataclasses.replace(model.spec, rule="causal", alignment="shifted", block_size=None,
                               clean_half="block_causal")
    return dataclasses.replace(model, spec=spec)


@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("block", (1, 4, 7))
def test_speculation_equals_autoregressive_decoding_token_for_token(toy, prompts, alignment, temperature, block):
    model = toy("block_causal", alignment, block, half="token_causal")
    expected = autoregressive(model).continued(prompts, 20, temperature=temperature)
    samples = model.continued(prompts, 20, unmasking="speculate", temperature=temperature)
    assert [s.tokens for s in samples] == [s.tokens for s in expected]
    if block > 1:
        assert all(s.nfe <= 2 * 20 for s in samples)  # at worst a draft and a verification per token


@pytest.mark.slow
def test_speculation_is_lossless_on_200_story_prompts_and_reports_tokens_per_forward(shared):
    """On a trained base, whose drafts from masked positions are poor: losslessness must hold for any weights."""
    stories = dlm_jax.load(shared / "stories260k").with_mask()
    spec = DiffusionSpec("shifted", "block_causal", 8, stories.spec.mask_token_id, stories.spec.bos_token_id,
                         stories.spec.eos_token_id, clean_half="token_causal")
    model = dataclasses.replace(stories, spec=spec)
    lines = (shared / "tinystories" / "tinystories_val.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    prompts = [" ".join(json.loads(line)["text"].split()[:4 + i % 9]) for i, line in enumerate(lines)]
    expected = autoregressive(stories).sample(prompts, max_tokens=40)
    samples = model.sample(prompts, max_tokens=40, unmasking="speculate")
    assert len(samples) == 200 and [s.tokens for s in samples] == [s.tokens for s in expected]
    rate = sum(s.new_tokens for s in samples) / sum(s.nfe for s in samples)
    assert 0.5 <= rate <= 8 and samples[0].tokens_per_forward == samples[0].new_tokens / samples[0].nfe


def test_the_agreed_prefix_ends_with_the_first_disagreement():
    open_positions = jnp.array([[0, 1, 1, 1, 1, 0]] * 3, bool)
    agrees = jnp.array([[0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]], bool)
    expected = [[0, 1, 1, 1, 0, 0], [0, 1, 0, 0, 0, 0], [0, 1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(agreed_prefix(open_positions, agrees), expected)


def test_speculation_keeps_nothing_after_an_end_token(toy, prompts):
    free = toy("block_causal", "shifted", 4, half="token_causal").continued(prompts, 20, unmasking="speculate")
    end = free[0].tokens[9]
    model = toy("block_causal", "shifted", 4, half="token_causal", eos=end)
    stopped = model.continued(prompts, 20, unmasking="speculate")
    for a, b, prompt in zip(stopped, free, prompts, strict=True):
        length = b.tokens.index(end, len(prompt)) + 1 if end in b.tokens[len(prompt):] else len(b.tokens)
        assert a.tokens == b.tokens[:length]


def test_a_perfect_draft_gives_one_block_per_two_forward_passes(toy, prompts):
    """A model that always writes the same token: every draft is right."""
    model = toy("block_causal", "shifted", 4, half="token_causal")
    constant = {**model.params, "final_norm": {"scale": model.params["final_norm"]["scale"] * 0}}
    sample = dataclasses.replace(model, params=constant).continued([[1, 2, 3, 4]], 17, unmasking="speculate")[0]
    # the prefill gives position 4; each block of four then takes a draft and a verification, which also gives the first
    # token of the next block
    assert sample.nfe == 1 + 2 * 4


def passes(model, text, prompt_length, size):
    """The forward passes in which a plain loop writes `text`: drafts by full passes, checked against the text."""
    is_shifted, n = model.spec.alignment == "shifted", len(text)
    count, first = 1, prompt_length + 1  # the prefill gives the first token
    while first < n:
        end, draft = min((first - 1) // size * size + size, n), {}
        if first % size:
            count += 1
            noisy = np.array([*text[:first], *[30] * (end - first)])
            logits = np.array(model.logits(noisy[None], rule="token_causal", block_size=size))[0]
            logits[:, 30] = -np.inf
            draft = {p: logits[p - is_shifted].argmax() for p in range(first, end)}
        count += 1
        while first < min(end, n - 1) and draft.get(first) == text[first]:
            first += 1
        first += 1
    return count


@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
def test_speculation_takes_as_many_passes_as_its_drafts_deserve(toy, prompts, alignment):
    """A worse draft changes no text, only this count. A narrow vocabulary makes some drafts right."""
    model = toy("block_causal", alignment, 4, half="token_causal")
    head = {"weight": model.params["head"]["weight"].at[4:].set(0)} if "head" in model.params else None
    model = dataclasses.replace(model, params=model.params | ({"head": head} if head else {}))
    samples = model.continued(prompts, 21, unmasking="speculate")
    counts = [passes(model, sample.tokens, len(prompt), 4) for sample, prompt in zip(samples, prompts)]
    assert [sample.nfe for sample in samples] == counts and len(set(counts)) > 1


def test_requests_that_cannot_be_written_left_to_right_are_refused(toy):
    hole = Request([1, 0, 2], [False, True, False], stop=False)
    with pytest.raises(UserError, match="token_causal"):
        toy("block_causal", "shifted", 4).continued([[1]], 3, unmasking="speculate")
    with pytest.raises(UserError, match="token_causal"):
        toy("bidirectional").continued([[1]], 3, unmasking="speculate")
    for model in (toy("block_causal", "shifted", 4, half="token_causal"), toy("causal")):
        with pytest.raises(UserError, match="left to right"):
            model.filled([hole], unmasking="speculate")
