"""Levels and the annealing schedule."""

import jax
import numpy as np
import pytest

from dlm_jax.diffusion.schedule import block_at, block_phases, growth, stratified_levels
from dlm_jax.errors import UserError

T_MIN = 0.01


@pytest.fixture(scope="module")
def levels() -> np.ndarray:
    """Many draws of 3 x 4 levels: [draws, 3, 4]."""
    keys = jax.random.split(jax.random.key(0), 4000)
    return np.asarray(jax.jit(jax.vmap(lambda key: stratified_levels(key, (3, 4), T_MIN)))(keys))


def test_one_level_falls_into_each_stratum(levels):
    strata = np.floor((1 - levels.reshape(-1, 12)) / (1 - T_MIN) * 12 + 1e-4)
    np.testing.assert_array_equal(np.sort(strata, axis=1), np.broadcast_to(np.arange(12), strata.shape))


def test_levels_lie_above_t_min_and_reach_one(levels):
    assert T_MIN < levels.min() < T_MIN + 1e-3
    assert 1 - 1e-3 < levels.max() <= 1


def test_the_level_of_each_place_is_uniform(levels):
    ordered = np.sort(levels.reshape(-1, 12), axis=0)
    expected = T_MIN + (1 - T_MIN) * (np.arange(len(ordered)) + 0.5) / len(ordered)
    # Kolmogorov-Smirnov at about 1 in 10,000 for each place.
    assert np.abs(ordered - expected[:, None]).max() < 2.2 / np.sqrt(len(ordered))


def test_neighbouring_places_have_unrelated_strata(levels):
    # Drawn without replacement, places are correlated by -1 / (places - 1), and no more.
    correlation = np.corrcoef(levels.reshape(-1, 12).T)
    off_diagonal = correlation[~np.eye(12, dtype=bool)]
    np.testing.assert_allclose(off_diagonal, -1 / 11, atol=0.07)


def test_annealing_grows_linearly_to_one_and_stays():
    np.testing.assert_allclose(growth(np.arange(6), 4), [0.25, 0.5, 0.75, 1, 1, 1])


def test_the_size_of_a_block_is_a_function_of_the_step():
    phases = block_phases("1x2, 4x1")
    assert phases == ((1, 2), (4, 1)) and block_phases("") == ()
    assert [block_at(step, phases, 8) for step in range(5)] == [1, 1, 4, 8, 8]


@pytest.mark.parametrize("text", ["4", "4x", "0x5", "4x0", "1x2,,4x4", "-1x3"])
def test_a_schedule_of_blocks_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="is no schedule of blocks; write SIZExSTEPS"):
        block_phases(text)


def test_no_annealing_opens_everything_at_once():
    np.testing.assert_array_equal(growth(np.arange(2), 0), 1)
