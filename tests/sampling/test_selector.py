"""Which places commit: the rule of each selector, on its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.errors import UserError
from dlm_jax.sampling.generate import selector
from dlm_jax.sampling.selector import Confidence, RandomOrder, Threshold, confidence_rank

KEYS = jax.random.split(jax.random.key(0), 2)


def left(*steps):
    return jnp.array(steps, jnp.int32)[:, None]


def test_random_order_spreads_the_commits_evenly_over_the_steps():
    """DiffuLLaMA reveals each place at t = T-1 .. 1 with probability 1/(t+1), and the rest at the end."""
    steps, places = 8, 40_000
    masked, counts = jnp.ones((1, places), bool), []
    for number in range(steps):
        keys = jax.random.split(jax.random.key(number), 1)
        chosen = RandomOrder()(keys, jnp.zeros((1, places)), masked, left(steps - number))
        assert not np.any(chosen & ~masked)
        counts.append(int(chosen.sum()))
        masked &= ~chosen
    expected = places / steps
    assert sum(counts) == places
    assert np.sum((np.array(counts) - expected) ** 2 / expected) < 24.3  # chi-squared, 7 degrees, p = 0.001


def test_confidence_takes_the_surest_places_that_finish_in_time_of_each_sequence():
    confidence = jnp.array([[0.1, 0.9, 0.5, 0.7, 0.3], [0.1, 0.9, 0.5, 0.7, 0.3]])
    masked = jnp.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], bool)
    chosen = Confidence()(KEYS, confidence, masked, left(2, 3))
    np.testing.assert_array_equal(chosen, [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(Confidence()(KEYS, confidence, masked, left(1, 1)), masked)


def test_threshold_takes_all_that_exceed_it_and_at_least_one():
    confidence = jnp.array([[0.1, 0.9, 0.5, 0.7], [0.1, 0.9, 0.5, 0.4]])
    masked = jnp.array([[1, 1, 1, 1], [1, 0, 1, 1]], bool)
    chosen = Threshold(0.5)(KEYS, confidence, masked, left(1, 1))
    np.testing.assert_array_equal(chosen, [[0, 1, 0, 1], [0, 0, 1, 0]])


def test_ties_go_to_the_earlier_place_and_masked_places_come_first():
    rank = confidence_rank(jnp.array([[0.5, 0.5, 0.9, jnp.nan, 0.5]]), jnp.array([[1, 1, 0, 1, 1]], bool))
    np.testing.assert_array_equal(rank, [[0, 1, 4, 3, 2]])


@pytest.mark.parametrize("name", ("", "best", "Confidence", "confidence:2", "threshold", "threshold:", "threshold:x",
                                  "threshold:1.5", "threshold:-0.1", "threshold:nan"))
def test_an_order_that_is_none_is_refused(name):
    with pytest.raises(UserError):
        selector(name)
