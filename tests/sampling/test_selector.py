"""Which places commit: the rule of each selector, on its own."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion.schedule import cosine, linear
from dlm_jax.errors import UserError
from dlm_jax.sampling.order import REVISIONS, TABLE, parse_order
from dlm_jax.sampling.selector import (
    Best,
    EntropyBound,
    Factor,
    RandomOrder,
    Threshold,
    View,
    entropy,
    left,
    margin,
    rank,
)


def view(confidence, masked=None, left=(1,), steps=8, logits=None, key=0, canvas=None):
    """What a selector sees, of lists."""
    confidence = jnp.asarray(confidence, jnp.float32)
    masked = jnp.ones(confidence.shape, bool) if masked is None else jnp.asarray(masked, bool)
    logits = jnp.stack([jnp.log(confidence), jnp.log1p(-confidence)], -1) if logits is None else jnp.asarray(logits)
    keys = jax.random.split(jax.random.key(key), len(confidence))
    column = jnp.broadcast_to(jnp.asarray(left, jnp.int32)[:, None], (len(confidence), 1))
    return View(keys, logits, jnp.argmax(logits, -1), confidence, masked,
                jnp.ones_like(masked) if canvas is None else jnp.asarray(canvas), jnp.full_like(column, steps), column)


@pytest.mark.parametrize("schedule", (linear, cosine))
def test_random_order_reveals_at_each_step_the_share_of_the_schedule(schedule):
    """DiffuLLaMA reveals each place at t = T-1 .. 1 with probability 1/(t+1), and the rest at the end."""
    steps, places = 8, 40_000
    masked, counts = np.ones((1, places), bool), []
    for number in range(steps):
        chosen = np.asarray(RandomOrder(schedule)(view(np.full((1, places), 0.5), masked, [steps - number], steps,
                                                       key=number)))
        assert not np.any(chosen & ~masked)
        counts.append(int(chosen.sum()))
        masked &= ~chosen
    grid = np.array([schedule(jnp.float32(step / steps)) for step in range(steps + 1)])
    expected = places * (grid[:-1] - grid[1:])
    assert sum(counts) == places
    assert np.sum((np.array(counts) - expected) ** 2 / expected) < 24.3  # chi-squared, 7 degrees, p = 0.001


def test_confidence_takes_the_surest_places_that_finish_in_time_of_each_sequence():
    confidence = [[0.1, 0.9, 0.5, 0.7, 0.3], [0.1, 0.9, 0.5, 0.7, 0.3]]
    masked = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], bool)
    np.testing.assert_array_equal(Best()(view(confidence, masked, [2, 3])), [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(Best()(view(confidence, masked, [1, 1])), masked)


@pytest.mark.parametrize("places,steps", ((27, 3), (9, 3), (64, 64), (10, 4), (3, 7)))
def test_an_even_schedule_commits_its_whole_numbers(places, steps):
    masked = np.ones((1, places), bool)
    for number in range(steps):
        chosen = np.asarray(Best()(view(np.linspace(0.1, 0.9, places)[None], masked, [steps - number], steps)))
        assert chosen.sum() == -(-masked.sum() // (steps - number)) or not masked.any()
        masked &= ~chosen
    assert not masked.any()


def test_the_cosine_schedule_commits_few_at_first_and_comes_to_its_end():
    masked, counts = np.ones((1, 40), bool), []
    for number in range(8):
        chosen = np.asarray(Best(schedule=cosine)(view(np.linspace(0.1, 0.9, 40)[None], masked, [8 - number], 8)))
        counts.append(int(chosen.sum()))
        masked &= ~chosen
    assert sum(counts) == 40 and counts[0] < 3 and counts[-2] > 6


def test_margin_entropy_and_left_score_what_they_say():
    p = np.array([[[0.5, 0.45, 0.05], [0.4, 0.3, 0.3], [0.34, 0.33, 0.33]]])
    seen = view(p.max(-1), logits=np.log(p))
    np.testing.assert_allclose(margin(seen), [[0.05, 0.1, 0.01]], atol=1e-6)
    np.testing.assert_allclose(entropy(seen), np.sum(p * np.log(p), -1), atol=1e-6)
    chosen = [np.flatnonzero(Best(score)(dataclasses.replace(seen, steps_left=jnp.array([[3]])))) for score in
              (margin, entropy, left)]
    assert [c.tolist() for c in chosen] == [[1], [0], [0]]
    banned = entropy(view([[0.5]], logits=jnp.array([[[0.0, 0.0, -jnp.inf]]])))
    np.testing.assert_allclose(banned, [[-np.log(2)]], rtol=1e-6)


def test_threshold_takes_all_that_exceed_it_and_at_least_one():
    confidence = [[0.1, 0.9, 0.5, 0.7], [0.1, 0.9, 0.5, 0.4]]
    masked = [[1, 1, 1, 1], [1, 0, 1, 1]]
    chosen = Threshold(0.5)(view(confidence, masked))
    np.testing.assert_array_equal(chosen, [[0, 1, 0, 1], [0, 0, 1, 0]])


def test_factor_takes_the_most_for_which_the_bound_holds():
    confidence = np.array([0.99, 0.95, 0.9, 0.6, 0.2])
    ordered = np.sort(confidence)[::-1]
    for factor in (0.01, 0.1, 0.3, 0.5, 1, 2.5, 10):
        holds = [n for n in range(1, 6) if (n + 1) * (1 - ordered[n - 1]) < factor]
        assert Factor(factor)(view(confidence[None])).sum() == max([1, *holds])


def test_where_the_bound_holds_parallel_greedy_is_sequential_greedy():
    """Fast-dLLM, theorem 1, on random joint distributions of four tokens of three kinds: where `factor:1` takes all
    places at once, their likeliest tokens are those of one place at a time, each given the ones before it."""
    random, met = np.random.default_rng(0), 0
    for _ in range(60):
        joint = random.dirichlet(np.full(3**4, 0.02))
        joint[random.integers(3**4)] += random.uniform(1, 6)
        joint = (joint / joint.sum()).reshape(3, 3, 3, 3)
        marginals = [joint.sum(tuple(set(range(4)) - {i})) for i in range(4)]
        if not np.all(Factor(1)(view([[m.max() for m in marginals]]))):
            continue
        met += 1
        for order in itertools.permutations(range(4)):
            given: list = [slice(None)] * 4
            for place in order:
                rest = joint[tuple(given)]
                axis = sum(isinstance(g, slice) for g in given[:place])
                given[place] = int(rest.sum(tuple(set(range(rest.ndim)) - {axis})).argmax())
            assert given == [int(m.argmax()) for m in marginals]
    assert met > 20


def test_the_entropy_bound_leaves_out_the_largest():
    p = np.array([[[0.9, 0.1], [0.5, 0.5], [0.99, 0.01], [0.8, 0.2]]])
    h = np.sort(-np.sum(p * np.log(p), -1)[0])
    for nats in (0, h[0] + 1e-4, h[:2].sum() + 1e-4, h[:2].sum() - 1e-4, 9):
        chosen = EntropyBound(nats)(view(p.max(-1), logits=np.log(p)))
        assert chosen.sum() == max(k for k in range(1, 5) if h[:k].sum() - h[k - 1] <= nats)


def test_ties_go_to_the_earlier_place_and_masked_places_come_first():
    found = rank(jnp.array([[0.5, 0.5, 0.9, jnp.nan, 0.5]]), jnp.array([[1, 1, 0, 1, 1]], bool))
    np.testing.assert_array_equal(found, [[0, 1, 4, 3, 2]])


EXAMPLES = [text for _, example in TABLE.values() for text in example.split(" or ")]


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_of_the_table_is_read_and_hashable(text):
    assert parse_order(text) == parse_order(text) and hash(parse_order(text).selector) is not None


@pytest.mark.parametrize("revision", [example for _, example in REVISIONS.values()])
def test_revisions_stand_behind_a_plus(revision):
    [found] = parse_order(f"threshold:0.9+{revision}").revisions
    assert type(found).__name__.lower() == revision.partition(":")[0]


@pytest.mark.parametrize("name", ("", "best", "Confidence", "confidence:2", "threshold", "threshold:", "threshold:x",
                                  "threshold:1.5", "threshold:-0.1", "threshold:nan", "factor:0", "factor:-1",
                                  "bound:-1", "random:even", "left:", "threshold:0.9+", "threshold:0.9+remask",
                                  "threshold:0.9+edit:2", "confidence+confidence", "speculate:3",
                                  "speculate+edit:0.9", "diffullama_confidence:0"))
def test_an_order_that_is_none_is_refused(name):
    with pytest.raises(UserError):
        parse_order(name)
