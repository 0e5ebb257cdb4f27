"""The bounds against enumerated expectations: every mask, with its weight integrated numerically over the level."""

import copy
import dataclasses
import functools
import itertools
import json
import math

import jax
import numpy as np
import pytest

from dlm_jax.attention.rules import Bidirectional, BlockCausal, Causal
from dlm_jax.errors import UserError
from dlm_jax.evaluation.log_likelihood import AR, Likelihood, batches, denoising_recipe, likelihood, texts_to_rows
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.transformer import forward, unembed

MASK = 30
T_MIN = 0.1  # small levels are rare and have large weights: without them fewer samples suffice
TEXT = [4, 7, 21, 11]  # the first is not predicted
WAYS = (("shifted", None), ("same_position", None), ("shifted", 2), ("same_position", 3))


@pytest.fixture(scope="module")
def model(random_model):
    return random_model("qwen2", tied_head=False)


@functools.partial(jax.jit, static_argnames="config")
def log_probabilities(params, tokens, segments, rule, config):
    hidden = forward(params, tokens, config=config, rule=rule, segments=segments)
    return jax.nn.log_softmax(unembed(params, hidden, config), -1)


def losses(model, tokens, rule, shifted):
    """-log p of each token of TEXT when the model reads `tokens`: [n]."""
    config, params = model
    padded = np.pad([tokens, np.ones_like(tokens)], ((0, 0), (0, len(TEXT) - len(tokens))))
    log_p = np.array(log_probabilities(params, padded[:1], padded[1:], rule, config)[0])[:len(tokens)]
    if shifted:
        log_p = np.concatenate([np.zeros_like(log_p[:1]), log_p[:-1]])
    return -log_p[np.arange(len(tokens)), TEXT[:len(tokens)]]


def weight(k, n, t_min):
    """The weight of one set of k masked positions of n: its probability t^k (1-t)^(n-k) times 1/t, averaged over t in
    (t_min, 1]."""
    t = t_min + (1 - t_min) * (np.arange(100_000) + 0.5) / 100_000
    return np.mean(t ** (k - 1) * (1 - t) ** (n - k))


def enumerated(model, shifted, block):
    """The exact bound: the sum over blocks, each read with clean text before it, and over all masks of the block."""
    size, rule = block or len(TEXT), BlockCausal(block) if block else Bidirectional()
    total = 0.0
    for start in range(0, len(TEXT), size):
        positions = range(max(start, 1), min(start + size, len(TEXT)))
        for k in range(1, len(positions) + 1):
            for masked in itertools.combinations(positions, k):
                noisy = [MASK if position in masked else token for position, token in enumerate(TEXT[:start + size])]
                total += weight(k, len(positions), T_MIN) * losses(model, noisy, rule, shifted)[list(masked)].sum()
    return total


def test_over_all_levels_the_weight_is_the_beta_function():
    for n in range(1, 5):
        for k in range(1, n + 1):
            beta = math.factorial(k - 1) * math.factorial(n - k) / math.factorial(n)
            assert weight(k, n, 0) == pytest.approx(beta, rel=1e-6)


@pytest.mark.parametrize("alignment,block", WAYS)
def test_the_monte_carlo_bound_averages_to_the_enumerated_one(model, alignment, block):
    config, params = model
    spec = DiffusionSpec(alignment, "block_causal" if block else "bidirectional", block, MASK)
    recipe = dataclasses.replace(denoising_recipe(spec), t_min=T_MIN)
    found = likelihood(params, config, recipe, MASK, texts_to_rows([TEXT]), mc_samples=4096)
    assert found.tokens == 3
    assert found.nats == pytest.approx(enumerated(model, alignment == "shifted", block), rel=0.03)


def test_the_autoregressive_likelihood_is_the_sum_over_the_tokens(model):
    config, params = model
    found = likelihood(params, config, AR, None, texts_to_rows([TEXT, TEXT[:3]]))
    each = losses(model, TEXT, Causal(), True)
    assert found.tokens == 5
    assert found.nats == pytest.approx(each[1:].sum() + each[1:3].sum(), rel=1e-5)
    assert found == pytest.approx(found.nats / 5)


def test_the_standard_error_is_that_of_the_estimates_of_many_seeds(model):
    config, params = model
    recipe = dataclasses.replace(denoising_recipe(DiffusionSpec()), t_min=T_MIN)
    rows = texts_to_rows([TEXT, TEXT[:3]])
    found = [likelihood(params, config, recipe, MASK, rows, 16, seed) for seed in range(60)]
    assert 0.8 < np.mean([each.error for each in found]) / np.std(found) < 2  # stratification makes it too large
    exact, single = (likelihood(params, config, each, MASK, rows).error for each in (AR, recipe))
    assert exact == 0 and math.isnan(single)


def test_the_noise_is_a_function_of_the_seed(model):
    config, params = model
    recipe = denoising_recipe(DiffusionSpec())
    first, again, other = (likelihood(params, config, recipe, MASK, texts_to_rows([TEXT]), 2, seed)
                           for seed in (0, 0, 1))
    assert first == again != other


def test_every_row_is_in_exactly_one_batch_of_few_shapes():
    random = np.random.default_rng(0)
    rows = texts_to_rows([random.integers(1, 30, random.integers(1, 200)) for _ in range(300)])
    found, shapes = [], set()
    for indices, tokens, segments in batches(rows):
        assert [rows[i][0].tolist() for i in indices] == [
            row[kept > 0].tolist() for row, kept in zip(tokens, segments) if kept.any()]
        shapes.add(tokens.shape)
        found += [tuple(row[kept > 0]) for row, kept in zip(tokens, segments) if kept.any()]
    assert sorted(found) == sorted(tuple(row) for row, _ in rows)
    assert len(shapes) == 4 and all(b * n <= 4096 for b, n in shapes)


def test_progress_counts_every_noising_of_every_row(model):
    config, params = model
    rows, calls = texts_to_rows([range(1, n) for n in (5, 40, 41, 7, 9)]), []
    likelihood(params, config, AR, None, rows, mc_samples=3, progress=lambda *each: calls.append(each))
    done = [each[0] for each in calls]
    assert done == sorted(set(done)) and calls[-1] == (15, 15) and {each[1] for each in calls} == {15}


def test_nothing_to_predict_gives_zero_and_zero_mc_samples_are_refused(model):
    config, params = model
    assert likelihood(params, config, AR, None, texts_to_rows([[3]])) == 0
    assert likelihood(params, config, AR, None, []).tokens == 0
    with pytest.raises(UserError, match="mc_samples"):
        likelihood(params, config, AR, None, texts_to_rows([TEXT]), mc_samples=0)


def test_a_likelihood_is_a_float_that_can_be_copied_and_serialized():
    copied = copy.deepcopy(Likelihood(6.0, 4, 0.25))
    assert (copied, copied.tokens, copied.nats, copied.error) == (1.5, 4, 6.0, 0.25) and json.dumps(copied) == "1.5"
