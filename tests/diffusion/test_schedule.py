"""Stratified levels, linear ramps and block schedules."""

import jax
import numpy as np
import pytest

from dlm_jax.diffusion.schedule import block_size_at, linear_ramp, parse_block_schedule, stratified_levels
from dlm_jax.errors import UserError

T_MIN = 0.01


@pytest.fixture(scope="module")
def levels() -> np.ndarray:
    """Many draws of 3 x 4 levels: [draws, 3, 4]."""
    keys = jax.random.split(jax.random.key(0), 4000)
    return np.asarray(jax.jit(jax.vmap(lambda key: stratified_levels(key, (3, 4), T_MIN)))(keys))


def test_each_stratum_has_one_level(levels):
    strata = np.floor((1 - levels.reshape(-1, 12)) / (1 - T_MIN) * 12 + 1e-4)
    np.testing.assert_array_equal(np.sort(strata, axis=1), np.broadcast_to(np.arange(12), strata.shape))


def test_levels_lie_above_t_min_and_reach_one(levels):
    assert T_MIN < levels.min() < T_MIN + 1e-3
    assert 1 - 1e-3 < levels.max() <= 1


def test_the_level_at_each_position_is_uniform(levels):
    ordered = np.sort(levels.reshape(-1, 12), axis=0)
    expected = T_MIN + (1 - T_MIN) * (np.arange(len(ordered)) + 0.5) / len(ordered)
    # Kolmogorov-Smirnov at about 1 in 10,000 per position.
    assert np.abs(ordered - expected[:, None]).max() < 2.2 / np.sqrt(len(ordered))


def test_neighboring_positions_have_unrelated_strata(levels):
    # Drawn without replacement, n positions are correlated by -1 / (n - 1), and no more.
    correlation = np.corrcoef(levels.reshape(-1, 12).T)
    off_diagonal = correlation[~np.eye(12, dtype=bool)]
    np.testing.assert_allclose(off_diagonal, -1 / 11, atol=0.07)


def test_a_ramp_rises_linearly_to_one_and_stays():
    np.testing.assert_allclose(linear_ramp(np.arange(6), 4), [0.25, 0.5, 0.75, 1, 1, 1])


def test_the_block_size_is_a_function_of_the_step():
    phases = parse_block_schedule("1x2, 4x1")
    assert phases == ((1, 2), (4, 1)) and parse_block_schedule("") == ()
    assert [block_size_at(step, phases, 8) for step in range(5)] == [1, 1, 4, 8, 8]


@pytest.mark.parametrize("text", ["4", "4x", "0x5", "4x0", "1x2,,4x4", "-1x3"])
def test_a_malformed_block_schedule_is_refused(text):
    with pytest.raises(UserError, match="is not a block schedule; write SIZExSTEPS"):
        parse_block_schedule(text)


def test_a_ramp_over_no_steps_is_one_at_once():
    np.testing.assert_array_equal(linear_ramp(np.arange(2), 0), 1)
