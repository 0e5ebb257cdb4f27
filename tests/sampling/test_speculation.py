"""Self-speculation is lossless: the text equals autoregressive decoding of the same model, token for token."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import softmax

import dlm_jax
from dlm_jax.errors import UserError
from dlm_jax.hashing import hash32
from dlm_jax.models.adapters import MaskAdapters
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import flatten, unflatten
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.speculation import GUESSES, agreed_prefix


def autoregressive(model):
    """The causal half on its own."""
    spec = dataclasses.replace(model.spec, rule="causal", alignment="shifted", block_size=None,
                               clean_half="block_causal")
    return dataclasses.replace(model, spec=spec)


@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("block,outcomes", ((1, 1), (4, 1), (4, 4), (7, 1), (7, 3)))
def test_speculation_equals_autoregressive_decoding_token_for_token(toy, prompts, alignment, temperature, block,
                                                                    outcomes):
    model = toy("block_causal", alignment, block, half="token_causal")
    expected = autoregressive(model).continued(prompts, 20, temperature=temperature)
    samples = model.continued(prompts, 20, unmasking=f"speculate:{outcomes}", temperature=temperature)
    assert [s.tokens for s in samples] == [s.tokens for s in expected]
    assert all(s.nfe <= 20 for s in samples)  # every forward pass gives a token


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


@pytest.mark.parametrize("temperature", (0.0, 1.0))
@pytest.mark.parametrize("window", (2, 5, 16, 64))
def test_jacobi_iteration_equals_autoregressive_decoding_token_for_token(toy, prompts, window, temperature):
    model = toy("causal", eos=7)
    expected = model.continued(prompts, 20, temperature=temperature)
    samples = model.continued(prompts, 20, unmasking=f"jacobi:{window}", temperature=temperature)
    assert [s.tokens for s in samples] == [s.tokens for s in expected]
    assert all(s.nfe <= e.nfe for s, e in zip(samples, expected))  # every forward pass gives a token


def iterations(model, text, prompt_length, window):
    """The forward passes in which a plain loop writes `text`, with guesses from the text and from its own last pass."""
    count, first, said = 1, prompt_length + 1, {}  # the prefill gives the first token
    while first < len(text):
        count += 1
        ends = min(first - 1 + window, len(text))
        guesses = [said.get(i, text[(int(hash32(np.uint32(i))) >> 1) % first]) for i in range(first, ends)]
        logits = np.array(model.logits(np.array([[*text[:first], *guesses]])))[0]
        said = {i + 1: int(logits[i].argmax()) for i in range(first - 1, ends)}
        while first < ends and guesses.pop(0) == text[first]:
            first += 1
        first += 1
    return count


@pytest.mark.parametrize("window", (2, 4, 9))
def test_jacobi_iteration_takes_as_many_passes_as_its_guesses_deserve(toy, prompts, window):
    model = toy("causal")
    head = {"weight": model.params["head"]["weight"].at[4:].set(0)} if "head" in model.params else None
    model = dataclasses.replace(model, params=model.params | ({"head": head} if head else {}))
    samples = model.continued(prompts, 30, unmasking=f"jacobi:{window}")
    counts = [iterations(model, s.tokens, len(p), window) for s, p in zip(samples, prompts)]
    assert [s.nfe for s in samples] == counts and min(counts) < 30


def test_a_model_with_gated_adapters_speculates_the_text_of_its_base(toy, prompts):
    base = toy("causal")
    model = toy("block_causal", "shifted", 4, half="token_causal", mask_adapters=MaskAdapters(30, 2, 1.0))
    leaves, old = flatten(model.params), flatten(base.params)
    model = dataclasses.replace(model, params=unflatten({path: old.get(path, w) for path, w in leaves.items()}))
    expected = [s.tokens for s in base.continued(prompts, 20, suppress_tokens=(30,))]
    assert [s.tokens for s in model.continued(prompts, 20, unmasking="speculate:2")] == expected


def test_a_perfect_draft_gives_one_block_per_forward_pass(toy):
    """A model that is sure of the same token everywhere: every draft is right."""
    model = toy("block_causal", "shifted", 4, half="token_causal", family="gpt2")
    token = model.params["embed"]["tokens"][3]
    always = {"scale": 0 * token, "bias": 30 * token / jnp.sum(token**2)}
    sure = dataclasses.replace(model, params={**model.params, "final_norm": always})
    [sample] = sure.continued([[1, 2, 3, 4]], 17, unmasking="speculate")
    # The first pass gives position 4 and drafts the rest of its block; then each gives that and the first token of the
    # next block.
    assert sample.tokens[4:] == [3] * 17 and sample.nfe == 1 + 4


def passes(model, text, prompt_length, size, outcomes):
    """The forward passes in which a plain loop writes `text`: drafts by full passes, checked against the text."""
    is_shifted, n = model.spec.alignment == "shifted", len(text)
    count, first, draft, said = 0, prompt_length, [], {}
    while first < n:
        count += 1
        expected, before = [], 1.0  # (minus the chance, position, guess or None)
        for i in range(len(draft) + 1):
            guesses = said.get(first + i, [])
            expected += [(-before * chance, first + i, token) for token, chance in guesses[i < len(draft):]]
            expected.append((-before * (1 - sum(chance for _, chance in guesses)), first + i, None))
            before *= guesses[0][1] if i < len(draft) else 1
        expected = [(position, token) for _, position, token in sorted(expected, key=lambda e: e[0])[:outcomes]]
        agreed = 0
        while agreed < len(draft) and first + agreed < n and draft[agreed] == text[first + agreed]:
            agreed += 1
        outcome = first + agreed
        first, draft = outcome + 1, []
        if outcome < n:
            known = next((token for token in (text[outcome], None) if (outcome, token) in expected), "unexpected")
            if known != "unexpected":
                end = outcome // size * size + size
                noisy = [*text[:outcome], 30 if known is None else known, *[30] * (end - outcome - 1)]
                logits = np.array(model.logits(np.array([noisy]), rule="token_causal", block_size=size))[0]
                logits[:, 30] = -np.inf
                p = np.exp(logits - logits.max(-1, keepdims=True))
                p /= p.sum(-1, keepdims=True)
                for i in range(first, end + is_shifted):
                    row = p[i - is_shifted]
                    said[i] = [(token, row[token]) for token in np.argsort(-row, kind="stable")[:GUESSES]]
                draft = [said[i][0][0] for i in range(first, end)]
    return count


@pytest.mark.parametrize("alignment", ("same_position", "shifted"))
@pytest.mark.parametrize("adapters", (None, MaskAdapters(30, 2, 1.0)), ids=("plain", "gated"))
@pytest.mark.parametrize("outcomes", (1, 2, 4, 16))
def test_speculation_takes_as_many_passes_as_its_drafts_deserve(toy, prompts, alignment, outcomes, adapters):
    """A worse draft changes no text, only this count. A narrow vocabulary makes some drafts right."""
    model = toy("block_causal", alignment, 4, half="token_causal", mask_adapters=adapters)
    head = {"weight": model.params["head"]["weight"].at[4:].set(0)} if "head" in model.params else None
    model = dataclasses.replace(model, params=model.params | ({"head": head} if head else {}))
    samples = model.continued(prompts, 21, unmasking=f"speculate:{outcomes}")
    counts = [passes(model, sample.tokens, len(prompt), 4, outcomes) for sample, prompt in zip(samples, prompts)]
    assert [sample.nfe for sample in samples] == counts and len(set(counts)) > 1


def test_sampled_speculation_draws_from_the_autoregressive_distribution(toy):
    """Texts of four tokens out of three against their exact probabilities; drafts are checked from the third on."""
    model, prompt, count = toy("block_causal", "shifted", 4, half="token_causal"), [5, 6, 7, 8], 4096
    settings = {"unmasking": "speculate:2", "temperature": 1.0, "suppress_tokens": tuple(range(3, 30))}
    samples = model.continued([prompt] * count, 4, **settings)
    texts = np.array(list(itertools.product(range(3), repeat=4)))
    logits = model.logits(np.array([[*prompt, *text] for text in texts]), rule="causal")[:, 3:-1, :3]
    log_p = np.take_along_axis(np.array(jax.nn.log_softmax(logits)), texts[..., None], -1).sum((1, 2)).astype(float)
    drawn = np.bincount([np.ravel_multi_index(sample.tokens[4:], (3,) * 4) for sample in samples], minlength=81)
    assert scipy.stats.chisquare(drawn, count * softmax(log_p)).pvalue > 1e-3
    assert len({sample.nfe for sample in samples}) > 1  # some drafts were kept


def test_requests_that_cannot_be_written_left_to_right_are_refused(toy):
    hole = Request([1, 0, 2], [False, True, False], stop=False)
    with pytest.raises(UserError, match="token_causal"):
        toy("block_causal", "shifted", 4).continued([[1]], 3, unmasking="speculate")
    with pytest.raises(UserError, match="token_causal"):
        toy("bidirectional").continued([[1]], 3, unmasking="speculate")
    with pytest.raises(UserError, match="jacobi is for autoregressive models"):
        toy("block_causal", "shifted", 4, half="token_causal").continued([[1]], 3, unmasking="jacobi")
    for model in (toy("block_causal", "shifted", 4, half="token_causal"), toy("causal")):
        with pytest.raises(UserError, match="left to right"):
            model.filled([hole], unmasking="speculate")
