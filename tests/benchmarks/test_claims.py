"""The benchmark of the claims: what it measures where the answer is known, and how it judges."""

import numpy as np
import pytest

from dlm_jax.diffusion.recipes import Recipe
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.diffusion_spec import DiffusionSpec


@pytest.fixture(scope="module")
def benchmarks(benchmark_modules):
    """(claims, claims_runs)"""
    pytest.importorskip("matplotlib")
    return benchmark_modules("claims"), benchmark_modules("claims_runs")


@pytest.fixture(scope="module")
def lm(random_model) -> LanguageModel:
    config, params = random_model()
    return LanguageModel(config, params, DiffusionSpec("shifted", "block_causal", 1, 30), None)


@pytest.fixture(scope="module")
def rows():
    random = np.random.default_rng(0)
    segments = [np.ones(12, np.int32), np.repeat([1, 2, 0], [5, 4, 3]).astype(np.int32)]
    return [(random.integers(0, 30, 12).astype(np.int32), each) for each in segments]


def test_decoded_one_at_a_time_in_blocks_of_one_a_text_costs_its_ar_nll(benchmarks, lm, rows):
    claims, runs = benchmarks
    ones = Recipe("nelbo", 2, "shifted", block_size=1)
    assert runs.parallel_nll(lm, ones, rows, 1) == pytest.approx(runs.nats(lm, runs.AR, rows), rel=1e-5)


def test_decoded_all_at_once_a_text_costs_the_loss_of_a_block_that_is_all_mask(benchmarks, lm, rows):
    claims, runs = benchmarks
    four = Recipe("nelbo", 2, "same_position", block_size=4, t_min=0.999)
    together = runs.parallel_nll(lm, four, rows, 4)
    assert together == pytest.approx(runs.nats(lm, four, rows), rel=1e-2)
    assert runs.parallel_nll(lm, four, rows, 1) != pytest.approx(together, rel=1e-3)


def test_every_claim_names_existing_setups_and_seeds_decide_it(benchmarks):
    claims, runs = benchmarks
    for claim in claims.CLAIMS:
        assert {claim.better, claim.worse} <= runs.SETUPS.keys() | {claims.BASE}
    claim = claims.CLAIMS[0]
    verdicts = [claims.Finding(claim, (1, 0), (2, 0), gain, width).verdict
                for gain, width in ((1, 0.5), (-1, 0.5), (0.1, 0.5), (1, float("nan")))]
    assert verdicts == ["holds", "does not", "cannot tell", "cannot tell"]
