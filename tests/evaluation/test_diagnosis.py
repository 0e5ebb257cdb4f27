"""A loss taken apart sums to the loss, and a model that is as sure as it is right is found calibrated."""

import numpy as np
import pytest

from dlm_jax.evaluation.diagnosis import ERRORS, PLACES, add, diagnose, diagnosis_of, no_counts
from dlm_jax.evaluation.log_likelihood import AR, denoising_recipe, likelihood, texts_to_rows
from dlm_jax.evaluation.prediction import Denoiser
from dlm_jax.models.diffusion_spec import DiffusionSpec

MASK = 30
SPECS = {"ar": None, "bidirectional": DiffusionSpec("shifted", "bidirectional", None, MASK),
         "blocks": DiffusionSpec("same_position", "block_causal", 4, MASK)}


@pytest.fixture(scope="module")
def texts():
    random = np.random.default_rng(0)
    return [list(random.integers(0, MASK, size)) for size in (33, 9, 50)]


def asked(config, kind):
    recipe = AR if kind == "ar" else denoising_recipe(SPECS[kind])
    return Denoiser(config, recipe, None if kind == "ar" else MASK)


@pytest.mark.parametrize("kind", SPECS)
def test_the_losses_at_the_places_sum_to_the_likelihood(random_model, texts, kind):
    config, params = random_model("qwen2")
    model = asked(config, kind)
    found = diagnose(params, model, texts, draws=64)
    assert len(found.loss) == (4 if kind == "blocks" else PLACES)
    predicted = [1 + np.arange(len(text) - 1) for text in texts]
    places = [at % 4 if kind == "blocks" else (at - 1) * PLACES // len(at) for at in predicted]
    tokens = np.bincount(np.concatenate(places), minlength=len(found.loss))
    nats = np.nansum(found.loss * tokens)
    expected = likelihood(params, config, model.recipe, model.mask_id, texts_to_rows(texts), mc_samples=64)
    assert nats == pytest.approx(expected.nats, rel=1e-4 if kind == "ar" else 0.03)


def test_of_an_autoregressive_model_every_token_but_the_first_is_predicted_once(random_model, texts):
    config, params = random_model("qwen2")
    assert diagnose(params, asked(config, "ar"), texts).count.sum() == sum(len(text) - 1 for text in texts)


def test_the_calibration_error_of_a_model_as_sure_as_it_is_right_is_zero_and_of_a_boaster_its_excess():
    random = np.random.default_rng(1)
    sure = random.uniform(0.05, 1, 100_000).astype(np.float32)
    for said, expected in ((sure, 0.0), (np.sqrt(sure), float(np.mean(np.sqrt(sure) - sure)))):
        counts = no_counts(None)
        add(counts, None, np.log(said), np.log(said), random.random(len(sure)) < sure, np.ones_like(sure))
        found = diagnosis_of(counts, None, "")
        assert found.calibration_error == pytest.approx(expected, abs=0.01)


def test_tokens_that_are_visible_count_at_their_place_and_in_no_bin():
    counts = no_counts(4)
    log_p = np.log(np.array([0.5, 0.25, 0.125], np.float32))
    add(counts, 4, log_p, log_p, np.array([True, False, True]), np.array([1, 0, 2], np.float32))
    assert np.allclose(counts[0][0], [0, np.log(2), 0, 2 * np.log(8)]) and list(counts[0][1]) == [0, 1, 1, 1]
    assert counts[1][2].sum() == 2


def test_above_a_threshold_no_more_tokens_are_wrong_than_was_asked():
    random = np.random.default_rng(2)
    sure = random.uniform(0, 1, 200_000).astype(np.float32)
    counts = no_counts(None)
    right = random.random(len(sure)) < sure  # above tau the mean confidence is (1 + tau) / 2
    add(counts, None, np.log(sure), np.log(sure), right, np.ones_like(sure))
    found = diagnosis_of(counts, None, "").thresholds
    np.testing.assert_allclose(found, [1 - 2 * error for error in ERRORS], atol=0.01)
    for threshold, error in zip(found, ERRORS):
        assert np.mean(~right[sure > threshold]) <= error * 1.01
    never = no_counts(None)
    add(never, None, np.log(sure), np.log(sure), np.zeros(len(sure), bool), np.ones_like(sure))
    assert np.isnan(diagnosis_of(never, None, "").thresholds).all()
