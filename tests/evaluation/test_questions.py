"""Likelihoods of continuations against enumeration: every mask, every text, and every interval."""

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.rules import Bidirectional
from dlm_jax.convert.native import write_native
from dlm_jax.errors import UserError
from dlm_jax.evaluation.estimators import STRATA, draw_noise, masked_draw
from dlm_jax.evaluation.intervals import Estimate, estimate
from dlm_jax.evaluation.log_likelihood import AR, denoising_recipe
from dlm_jax.evaluation.prediction import Denoiser, predict
from dlm_jax.evaluation.questions import Choice, Question, Scorer, make_rows, question_key, settled
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.transformer import forward, unembed

MASK = 30
CONTEXT, CONTINUATION = [4, 7], [21, 11, 3]
WAYS = (("shifted", None), ("same_position", None), ("shifted", 2), ("same_position", 3))


@pytest.fixture(scope="module")
def model(random_model):
    config, params = random_model("qwen2", tied_head=False)
    return config, jax.tree.map(lambda w: 4 * w, params)  # far from uniform


def denoiser(config, alignment, block, **fields):
    spec = DiffusionSpec(alignment, "block_causal" if block else "bidirectional", block, MASK)
    return Denoiser(config, denoising_recipe(spec), MASK, **fields)


def blocks_of(block):
    """The indices of the continuation's tokens in each of its blocks."""
    of = [(len(CONTEXT) + i) // block if block else 0 for i in range(len(CONTINUATION))]
    return [[i for i, number in enumerate(of) if number == each] for each in sorted(set(of))]


def enumerated(params, asked, block):
    """The bound, over all masks of each block: the number of masked tokens is uniform."""
    rows = make_rows([Choice(CONTEXT, CONTINUATION)], 32)
    total = 0.0
    for indices in blocks_of(block):
        for k in range(1, len(indices) + 1):
            subsets = list(itertools.combinations(indices, k))
            for subset in subsets:
                masked = np.isin(np.arange(4), subset)[None]
                log_p = np.array(predict(params, rows, jnp.asarray(masked), asked, real_tokens=False).log_p[0])
                total -= log_p[list(subset)].sum() * len(indices) / k / len(subsets) / len(indices)
    return total


def draws_of(params, asked, seed, count):
    """The bound's draws of the continuation, as a question would take them."""
    choice = Choice(CONTEXT, CONTINUATION)
    rows = make_rows([choice] * count, 32)
    keys = jnp.stack([question_key(seed, "question")] * count)
    return np.asarray(masked_draw(params, rows, keys, jnp.arange(count), model=asked, size=4))


@pytest.mark.parametrize("alignment,block", WAYS)
def test_the_draws_average_to_the_enumerated_bound(model, alignment, block):
    config, params = model
    asked = denoiser(config, alignment, block)
    draws = draws_of(params, asked, 0, 512)
    low, high = estimate(draws).interval(0.9999)
    assert low <= enumerated(params, asked, block) <= high


@pytest.mark.parametrize("alignment,block", (("same_position", None), ("shifted", 2)))
def test_the_interval_covers_the_bound_in_at_least_93_of_100_seeds(model, alignment, block):
    config, params = model
    asked = denoiser(config, alignment, block)
    exact = enumerated(params, asked, block)
    intervals = [estimate(draws_of(params, asked, seed, 32)).interval() for seed in range(100)]
    assert sum(low <= exact <= high for low, high in intervals) >= 93


def test_a_round_of_draws_covers_every_stratum_in_every_block():
    block = jnp.array([0, 1, 0, 1, 2, 0])
    for draw in (0, STRATA):
        t = np.stack([draw_noise(jax.random.key(1), jnp.asarray(draw + i), block)[0] for i in range(STRATA)])
        assert np.all(np.sort(np.floor(t * STRATA), 0) == np.arange(STRATA)[:, None])
        assert np.all(t[:, 0] == t[:, 1]) and np.any(t[:, 0] != t[:, 2])


def test_the_noise_of_a_token_does_not_depend_on_how_long_the_window_is():
    short, long = (draw_noise(jax.random.key(3), jnp.asarray(5), jnp.arange(size)) for size in (4, 64))
    for a, b in zip(short, long):
        assert np.array_equal(a, b[:4])


def test_with_blocks_of_one_token_the_bound_is_the_exact_likelihood_left_to_right(model):
    config, params = model
    question = Question("question", [Choice(CONTEXT, CONTINUATION)])
    [[exact]] = Scorer(params, Denoiser(config, AR, None)).score([question])
    bound = draws_of(params, denoiser(config, "shifted", 1), 0, 8)
    assert np.allclose(bound, -exact.log_p, atol=1e-4)
    assert exact.error == 0 and exact.draws == 0


@pytest.mark.parametrize("alignment,block", WAYS)
def test_in_decoding_order_the_probabilities_of_all_texts_sum_to_one(random_model, alignment, block):
    config, params = random_model("qwen2", tied_head=False, vocab_size=6)
    params = jax.tree.map(lambda w: 4 * w, params)
    spec = DiffusionSpec(alignment, "block_causal" if block else "bidirectional", block, 5)
    scorer = Scorer(params, Denoiser(config, denoising_recipe(spec), 5), "decoding_order")
    texts = list(itertools.product(range(5), repeat=3))
    [scores] = scorer.score([Question("all", [Choice([1, 2], text) for text in texts])])
    assert math.fsum(math.exp(score.log_p) for score in scores) == pytest.approx(1, abs=1e-4)
    assert sum(score.greedy for score in scores) == 1


def scorer_of(model, **fields):
    config, params = model
    return Scorer(params, denoiser(config, "same_position", 3), **fields)


QUESTIONS = [Question(f"question {i}", [Choice([4, 7, *range(1, 2 + i)], [21, 11, 3][:1 + (i + j) % 3], 2 + j)
                                        for j in range(3)]) for i in range(6)]


@pytest.mark.parametrize("method", ("monte_carlo", "decoding_order"))
def test_a_score_depends_neither_on_the_batch_nor_on_the_order_nor_on_what_else_is_asked(model, method):
    together = scorer_of(model, method=method, max_draws=16).score(QUESTIONS)
    backwards = scorer_of(model, method=method, max_draws=16, batch_rows=2).score(QUESTIONS[::-1])[::-1]
    alone = [scorer_of(model, method=method, max_draws=16).score([question])[0] for question in QUESTIONS]
    long = Question("long", [Choice([5] * 40, [6] * 20)])
    with_long = scorer_of(model, method=method, max_draws=16).score([*QUESTIONS, long])[:-1]
    for scores in (backwards, alone, with_long):
        for expected, found in zip(together, scores, strict=True):
            assert [(s.greedy, s.draws) for s in found] == [(s.greedy, s.draws) for s in expected]
            assert np.allclose([(s.log_p, s.error) for s in found], [(s.log_p, s.error) for s in expected],
                               atol=1e-3)


def test_choices_of_one_text_get_one_score_since_they_share_their_noise(model):
    [scores] = scorer_of(model, max_draws=16).score([Question("question", [Choice(CONTEXT, CONTINUATION)] * 2)])
    assert scores[0] == scores[1]


def test_draws_are_added_until_the_best_choice_is_settled(model):
    apart = np.array([[1.0, 1.1] * 4, [5.0, 5.1] * 4])
    close = np.array([[1.0, 5.0] * 4, [5.1, 1.2] * 4])
    assert settled(apart, [1, 1]) and not settled(close, [1, 1])
    assert not settled(apart, [1, 5])  # per unit of size they are close
    scores = scorer_of(model, max_draws=64).score(QUESTIONS)
    draws = [score.draws for [score, *_] in scores]
    assert all(draw % STRATA == 0 and draw <= 64 for draw in draws) and len(set(draws)) > 1


def test_the_error_shrinks_as_the_number_of_draws_grows(model):
    config, params = model
    draws = draws_of(params, denoiser(config, "same_position", None), 0, 512)
    assert 0.35 < estimate(draws).error / estimate(draws[:128]).error < 0.7


def test_an_exact_value_has_an_interval_without_width():
    assert estimate(np.full((3, 8), 2.0)) == Estimate(6.0, 0.0, math.inf)
    assert estimate(np.full((3, 8), 2.0)).interval() == (6.0, 6.0)


@pytest.mark.parametrize("block", (None, 2))
def test_guidance_moves_the_logits_away_from_those_without_the_context(model, block):
    config, params = model
    plain = denoiser(config, "same_position", block)
    guided = dataclasses.replace(plain, cfg_scale=1.5)

    def log_p(asked, context):
        rows = make_rows([Choice(context, [token]) for token in range(MASK)], 32)
        return np.asarray(predict(params, rows, jnp.ones((MASK, 1), bool), asked, real_tokens=True).log_p[:, 0])

    logits = 2.5 * log_p(plain, CONTEXT) - 1.5 * log_p(plain, [MASK] * len(CONTEXT))
    expected = logits - np.logaddexp.reduce(logits)
    assert np.allclose(log_p(guided, CONTEXT), expected, atol=1e-3)
    assert not np.allclose(log_p(plain, CONTEXT), expected, atol=0.1)


@pytest.mark.parametrize("choice,said", (
    (Choice([], [1]), "token to start from"), (Choice([1], []), "token to predict"),
    (Choice([1] * 40, [2] * 30), "take 70 tokens and this model reads 64")))
def test_a_choice_that_cannot_be_scored_is_refused(model, choice, said):
    with pytest.raises(UserError, match=said):
        scorer_of(model).score([Question("question", [choice])])


@pytest.mark.parametrize("fields,said", (
    ({"method": "guess"}, "'guess' is not a way"), ({"max_draws": 9}, "multiple of 8")))
def test_settings_out_of_range_are_refused(model, fields, said):
    with pytest.raises(UserError, match=said):
        scorer_of(model, **fields)


ON_DEVICES = """
import json, runpy, sys
import jax
tests = runpy.run_path(sys.argv[1])
from dlm_jax.convert.native import read_native
from dlm_jax.evaluation.questions import Scorer
bundle = read_native(sys.argv[2])
found = {}
for alignment, block in tests["WAYS"]:
    asked = tests["denoiser"](bundle.config, alignment, block)
    for method in ("monte_carlo", "decoding_order"):
        scorer = Scorer(bundle.params, asked, method, max_draws=8)
        found[f"{alignment} {block} {method}"] = [score for each in scorer.score(tests["QUESTIONS"]) for score in each]
print(json.dumps([jax.local_device_count(), found]))
"""


@pytest.mark.slow
def test_a_score_does_not_depend_on_the_number_of_devices(random_model, tmp_path):
    config, params = random_model("qwen2", tied_head=False)
    write_native(tmp_path, Bundle(config, params, DiffusionSpec()))
    results = {}
    for count in (1, 2, 8):
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(count)}
        done = subprocess.run([sys.executable, "-c", ON_DEVICES, __file__, str(tmp_path)], env=environment,
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        devices, results[count] = json.loads(done.stdout.splitlines()[-1])
        assert devices == count
    for count in (2, 8):
        for way, scores in results[1].items():
            assert np.allclose(results[count][way], scores, atol=1e-3), (count, way)


def test_the_score_of_diffullama_is_the_mean_over_levels_of_the_mean_loss_of_masked_tokens(model):
    config, params = model
    asked = denoiser(config, "shifted", None)
    [[score]] = Scorer(params, asked, "diffullama").score([Question("question", [Choice(CONTEXT, CONTINUATION)])])
    terms = []
    for step in range(1, 33):  # as their loop has it, on the same masks
        key = jax.random.fold_in(question_key(0, "question"), step)
        masked = np.asarray(jax.random.uniform(key, (4,)) < step / 32)[:3]
        text = np.array([*CONTEXT, *np.where(masked, MASK, CONTINUATION)])
        logits = dlm_logits(config, params, text)
        losses = [-jax.nn.log_softmax(logits[i + 1])[CONTINUATION[i]] for i in range(3) if masked[i]]
        terms.append(np.mean(losses) if losses else 0.0)
    assert score.log_p == pytest.approx(-np.mean(terms), abs=1e-4) and score.draws == 32


def dlm_logits(config, params, text):
    """The logits of a bidirectional model: entry i predicts token i + 1."""
    hidden = forward(params, jnp.asarray(text)[None], config=config, rule=Bidirectional())
    return unembed(params, hidden, config)[0]
