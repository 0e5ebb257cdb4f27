"""The library's main interface, on a trained model of 260k parameters and on random ones."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax.attention.rules import Bidirectional, BlockCausal, Causal
from dlm_jax.errors import UserError
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.models.weights import flatten

RULES = {"causal": Causal(), "bidirectional": Bidirectional(), "block_causal": BlockCausal(3)}

pytestmark = pytest.mark.usefixtures("optimized")


@pytest.fixture(scope="module")
def stories(shared):
    return dlm_jax.load(shared / "stories260k")


@pytest.fixture(scope="module")
def texts(shared):
    lines = (shared / "tinystories" / "tinystories_val.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


@pytest.fixture(scope="module")
def infiller(stories):
    """An untrained diffusion model with a real tokenizer."""
    model = stories.with_mask()
    return dataclasses.replace(model, spec=dataclasses.replace(model.spec, rule="bidirectional", recipe="diffullama"))


@pytest.fixture(scope="module")
def toy(random_model):
    config, params = random_model()
    return LanguageModel(config, jax.tree.map(jax.numpy.asarray, params),
                         DiffusionSpec("same_position", "block_causal", 3, 30, 1, 2, "bd3lm"), None)


def test_greedy_text_equals_that_of_the_original_program(stories, shared):
    written = (shared / "stories260k" / "CHECK_OUTPUT.txt").read_text(encoding="utf-8")
    expected = written.split("--- greedy, prompt='Once upon a time', 256 tokens\n")[1].split("\n---")[0].strip()
    assert stories.sample("Once upon a time", max_tokens=252).text.startswith(expected)
    assert expected.startswith(stories.sample(max_tokens=100).text)


def test_the_autoregressive_likelihood_has_its_known_value(stories, texts):
    found = stories.ar_nll(texts[:300])
    assert found.tokens == 96_867
    assert found == pytest.approx(1.3022, abs=0.005)


def test_the_bound_of_an_unadapted_model_is_near_that_of_a_uniform_guess(stories, texts):
    found = stories.nelbo(texts[:30], mc_samples=1)
    assert 5.9 < found < 6.5
    assert found == stories.nelbo(texts[:30], mc_samples=1) != stories.nelbo(texts[:30], mc_samples=1, seed=1)


@pytest.mark.parametrize("rule", RULES)
def test_logits_equal_those_of_the_forward_pass(toy, rule):
    tokens = np.arange(14).reshape(2, 7)
    expected = jax.jit(lambda p: unembed(p, forward(p, tokens, config=toy.config, rule=RULES[rule]), toy.config))
    np.testing.assert_allclose(toy.logits(tokens, rule), expected(toy.params), atol=1e-5)
    if rule == toy.spec.rule:
        np.testing.assert_array_equal(toy.logits(tokens, rule), toy.logits(tokens))


def test_tokens_that_do_not_fit_the_model_are_refused(toy, random_model):
    for tokens in (np.arange(3), np.zeros((1, 65), int), np.full((1, 3), 31), np.full((1, 3), -1)):
        with pytest.raises(UserError):
            toy.logits(tokens)
    with pytest.raises(UserError, match="diagonal"):
        toy.logits(np.zeros((1, 3), int), "diagonal")
    plain = dataclasses.replace(toy, spec=DiffusionSpec())
    with pytest.raises(UserError, match="block_size"):
        plain.logits(np.zeros((1, 3), int), "block_causal")
    assert plain.logits(np.zeros((1, 3), int), "block_causal", block_size=2).shape == (1, 3, 31)


def test_a_model_without_a_tokenizer_refuses_text(toy):
    for call in (toy.sample, toy.infill, toy.nelbo, toy.ar_nll):
        with pytest.raises(UserError, match="tokenizer"):
            call("a[MASK:2]")


def test_the_repr_is_one_line_of_facts(toy):
    text = repr(toy)
    assert text.startswith("LanguageModel(qwen2, ") and "parameters" in text and "\n" not in text and len(text) < 200
    for fact in ("rule=block_causal", "alignment=same_position", "block_size=3", "mask_token_id=30"):
        assert fact in text


def test_several_prompts_return_several_samples(stories):
    assert stories.sample([]) == []
    first, second = stories.sample(["Tom", "The dog was"], max_tokens=8)
    assert first.text.startswith("Tom") and second.text.startswith("The dog was")
    assert first.new_tokens == second.new_tokens == 8


@pytest.mark.parametrize("text,widths", (("Once[MASK:3] a time, there[MASK:1] a girl.", [3, 1]),
                                         ("[MASK:4] said Lily.", [4]),
                                         ("She went[MASK:2][MASK:3].\n\tThen", [5]), ("The end[MASK:2]", [2])))
def test_holes_are_filled_and_the_text_around_them_is_unchanged(infiller, text, widths):
    sample = infiller.infill(text)
    holes = "".join("#" if step else "." for step in sample.commit_step)
    assert [len(run) for run in holes.split(".") if run] == widths
    pieces = infiller.tokenizer.pieces(sample.tokens)
    around = "".join("#" if step else piece for step, piece in zip(sample.commit_step, pieces))
    expected = text
    for width in (1, 2, 3, 4):
        expected = expected.replace(f"[MASK:{width}]", "#" * width)
    assert around.lstrip() == expected.lstrip()
    assert "<|mask|>" not in sample.text


def test_a_hole_of_unknown_width_takes_the_best_scoring_width(infiller):
    fixed = [infiller.infill(f"Tom[MASK:{width}] ran.") for width in (2, 3, 4, 5)]
    best = infiller.infill("Tom[MASK:2-5] ran.")
    expected = max(fixed, key=lambda sample: sample.score)
    assert best.tokens == expected.tokens and best.score == pytest.approx(expected.score)
    assert best.nfe == sum(sample.nfe for sample in fixed)


def test_a_text_ends_with_the_stop_token(stories):
    free = stories.sample("Once upon a time", max_tokens=40)
    stopped = stories.sample("Once upon a time", max_tokens=40, stop=".")
    assert stopped.text.endswith(".") and free.text.startswith(stopped.text)
    with pytest.raises(UserError, match="not one token"):
        stories.sample("Once", stop="<|nothing of the kind|>")


def test_several_texts_are_infilled_at_once(infiller):
    samples = infiller.infill(["Tom[MASK:2] ran", "A[MASK:12] dog"])
    assert [sample.new_tokens for sample in samples] == [2, 12]
    assert samples[0].text == infiller.infill("Tom[MASK:2] ran").text


@pytest.mark.parametrize("words,call", (
    ("autoregressive", lambda ar, lm: ar.infill("a[MASK:2]b")),
    ("no hole", lambda ar, lm: lm.infill("no hole [MASK] here")),
    ("no hole", lambda ar, lm: lm.infill("a[MASK:0]b")),
    ("mask token itself", lambda ar, lm: lm.infill("a <|mask|> b[MASK:2]")),
    ("mask token itself", lambda ar, lm: lm.sample("a <|mask|> b")),
    ("context", lambda ar, lm: lm.infill("a[MASK:99999999999999]b")),
    ("context", lambda ar, lm: lm.sample("a", max_tokens=10**15)),
    ("context", lambda ar, lm: lm.sample("a dog " * 200, max_tokens=300)),
    ("max_tokens", lambda ar, lm: lm.sample("a", max_tokens=0)),
    ("steps", lambda ar, lm: lm.sample("a", steps=0)),
    ("unmasking strategy", lambda ar, lm: lm.sample("a", unmasking="sideways")),
    ("mc_samples", lambda ar, lm: lm.nelbo("a", mc_samples=0)),
))
def test_an_impossible_request_is_refused_with_its_cause(stories, infiller, words, call):
    with pytest.raises(UserError, match=words):
        call(stories, infiller)


def test_a_hole_at_the_very_start_needs_a_token_that_predicts_it(infiller):
    spec = dataclasses.replace(infiller.spec, bos_token_id=None, eos_token_id=None)
    startless = dataclasses.replace(infiller, spec=spec)
    with pytest.raises(UserError, match="before the hole"):
        startless.infill("[MASK:2] said Lily")
    unshifted = dataclasses.replace(startless, spec=dataclasses.replace(startless.spec, alignment="same_position"))
    assert unshifted.infill("[MASK:2] said Lily").commit_step[:2] != [0, 0]


def test_saving_and_loading_returns_the_same_model(infiller, tmp_path):
    infiller.save(tmp_path / "model")
    again = dlm_jax.load(tmp_path / "model")
    assert (again.config, again.spec) == (infiller.config, infiller.spec)
    leaves = flatten(again.params)
    for path, leaf in flatten(infiller.params).items():
        np.testing.assert_array_equal(leaves[path], leaf)
    text = "Once[MASK:3] time"
    assert again.infill(text) == infiller.infill(text)
    with pytest.raises(UserError, match="exists"):
        infiller.save(tmp_path / "model")


def test_exporting_and_loading_gives_the_same_logits(stories, infiller, tmp_path):
    tokens = np.arange(12)[None]
    for name, model in {"ar": stories, "dlm": infiller}.items():
        model.export(tmp_path / name)
        again = dlm_jax.load(tmp_path / name)
        np.testing.assert_array_equal(again.logits(tokens), model.logits(tokens))
        assert again.spec.rule == model.spec.rule
        assert again.encode("Lily <|mask|> ran") == model.encode("Lily <|mask|> ran")


def test_a_model_without_a_tokenizer_is_saved_without_one(toy, tmp_path):
    toy.save(tmp_path / "toy")
    again = dlm_jax.load(tmp_path / "toy")
    assert again.tokenizer is None and again.spec == toy.spec


def test_a_source_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(UserError):
        dlm_jax.load(tmp_path / "nowhere")


def test_the_bundled_model_writes_something():
    model = dlm_jax.load("bundled")
    assert model.sample("def ", max_tokens=4).new_tokens > 0
