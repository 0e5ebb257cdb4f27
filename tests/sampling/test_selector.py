"""Which positions commit: the rule of each selector, on its own."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion.schedule import cosine
from dlm_jax.errors import UserError
from dlm_jax.sampling.selector import (
    DiffuLLaMAConfidence,
    DiffuLLaMARandom,
    EntropyBound,
    Factor,
    Frechet,
    Threshold,
    TopScore,
    View,
    entropy,
    left_to_right,
    margin,
    rank,
)
from dlm_jax.sampling.unmasking import REVISIONS, SELECTORS, parse_unmasking


def view(confidence, masked=None, left=(1,), steps=8, logits=None, key=0, fillable=None):
    """A `View` from lists."""
    confidence = jnp.asarray(confidence, jnp.float32)
    masked = jnp.ones(confidence.shape, bool) if masked is None else jnp.asarray(masked, bool)
    logits = jnp.stack([jnp.log(confidence), jnp.log1p(-confidence)], -1) if logits is None else jnp.asarray(logits)
    keys = jax.random.split(jax.random.key(key), len(confidence))
    column = jnp.broadcast_to(jnp.asarray(left, jnp.int32)[:, None], (len(confidence), 1))
    fillable = jnp.ones_like(masked) if fillable is None else jnp.asarray(fillable)
    return View(keys, logits, jnp.argmax(logits, -1), confidence, masked, fillable, jnp.full_like(column, steps),
                column)


def test_the_random_sampler_of_diffullama_reveals_the_fraction_that_the_linear_schedule_asks_for():
    """It reveals each position at t = T-1 .. 1 with probability 1/(t+1), and the rest at the end."""
    steps, positions = 8, 40_000
    masked, counts = np.ones((1, positions), bool), []
    for number in range(steps):
        chosen = np.asarray(DiffuLLaMARandom()(view(np.full((1, positions), 0.5), masked, [steps - number], steps,
                                                key=number)))
        assert not np.any(chosen & ~masked)
        counts.append(int(chosen.sum()))
        masked &= ~chosen
    expected = positions / steps
    assert sum(counts) == positions
    assert np.sum((np.array(counts) - expected) ** 2 / expected) < 24.3  # chi-squared, 7 degrees, p = 0.001


def test_confidence_takes_as_many_of_the_most_confident_positions_as_the_steps_left_require():
    confidence = [[0.1, 0.9, 0.5, 0.7, 0.3], [0.1, 0.9, 0.5, 0.7, 0.3]]
    masked = np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 1]], bool)
    np.testing.assert_array_equal(TopScore()(view(confidence, masked, [2, 3])), [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]])
    np.testing.assert_array_equal(TopScore()(view(confidence, masked, [1, 1])), masked)


@pytest.mark.parametrize("positions,steps", ((27, 3), (9, 3), (64, 64), (10, 4), (3, 7)))
def test_the_linear_schedule_commits_exact_counts(positions, steps):
    masked = np.ones((1, positions), bool)
    for number in range(steps):
        chosen = np.asarray(TopScore()(view(np.linspace(0.1, 0.9, positions)[None], masked, [steps - number], steps)))
        assert chosen.sum() == -(-masked.sum() // (steps - number)) or not masked.any()
        masked &= ~chosen
    assert not masked.any()


def test_the_cosine_schedule_commits_few_at_first_and_finishes_in_time():
    masked, counts = np.ones((1, 40), bool), []
    for number in range(8):
        chosen = np.asarray(TopScore(schedule=cosine)(view(np.linspace(0.1, 0.9, 40)[None], masked, [8 - number], 8)))
        counts.append(int(chosen.sum()))
        masked &= ~chosen
    assert sum(counts) == 40 and counts[0] < 3 and counts[-2] > 6


def test_margin_entropy_and_left_to_right_scores():
    p = np.array([[[0.5, 0.45, 0.05], [0.4, 0.3, 0.3], [0.34, 0.33, 0.33]]])
    seen = view(p.max(-1), logits=np.log(p))
    np.testing.assert_allclose(margin(seen), [[0.05, 0.1, 0.01]], atol=1e-6)
    np.testing.assert_allclose(entropy(seen), np.sum(p * np.log(p), -1), atol=1e-6)
    chosen = [np.flatnonzero(TopScore(score)(dataclasses.replace(seen, steps_left=jnp.array([[3]])))) for score in
              (margin, entropy, left_to_right)]
    assert [c.tolist() for c in chosen] == [[1], [0], [0]]
    banned = entropy(view([[0.5]], logits=jnp.array([[[0.0, 0.0, -jnp.inf]]])))
    np.testing.assert_allclose(banned, [[-np.log(2)]], rtol=1e-6)


def test_threshold_takes_every_position_above_it_and_at_least_one():
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


def test_frechet_takes_the_most_for_which_the_bounds_leave_the_margin():
    random = np.random.default_rng(0)
    for _ in range(40):
        confidence, margin = 1 - random.uniform(0, 1, (1, 6)) ** 4, random.choice([0.0, 0.1, 0.5])
        masked = random.random((1, 6)) < 0.8
        masked[0, random.integers(6)] = True
        c = np.sort(confidence[masked])[::-1]
        holds = [n for n in range(1, len(c) + 1) if c[:n].sum() - (n - 1) - (1 - c[n - 1]) > margin]
        chosen = np.asarray(Frechet(margin)(view(confidence, masked)))
        assert chosen.sum() == max([1, *holds]) and not np.any(chosen & ~masked)
        assert set(confidence[chosen]) == set(c[:chosen.sum()])
        if margin == 0:
            assert chosen.sum() >= np.asarray(Factor(1.0)(view(confidence, masked))).sum()


def test_with_equal_confidences_frechet_is_factor_1():
    for c in (0.3, 0.6, 0.7, 0.76, 0.81, 0.84, 0.9):
        equal = view(np.full((1, 6), c))
        assert Frechet()(equal).sum() == Factor(1.0)(equal).sum()


@pytest.mark.parametrize("rule", (Factor(1.0), Frechet()))
def test_where_the_bound_holds_parallel_greedy_equals_sequential_greedy(rule):
    """Fast-dLLM, theorem 1, on random joint distributions of four tokens of three kinds: where the rule takes all
    positions at once, their most likely tokens are those found one position at a time, each conditioned on those
    before."""
    random, met = np.random.default_rng(0), 0
    for _ in range(60):
        joint = random.dirichlet(np.full(3**4, 0.02))
        joint[random.integers(3**4)] += random.uniform(1, 6)
        joint = (joint / joint.sum()).reshape(3, 3, 3, 3)
        marginals = [joint.sum(tuple(set(range(4)) - {i})) for i in range(4)]
        if not np.all(rule(view([[m.max() for m in marginals]]))):
            continue
        met += 1
        for order in itertools.permutations(range(4)):
            decided: list = [slice(None)] * 4
            for position in order:
                rest = joint[tuple(decided)]
                axis = sum(isinstance(token, slice) for token in decided[:position])
                decided[position] = int(rest.sum(tuple(set(range(rest.ndim)) - {axis})).argmax())
            assert decided == [int(m.argmax()) for m in marginals]
    assert met > 20


def test_the_entropy_bound_of_a_broken_model_still_commits_a_token():
    logits = np.full((1, 4, 3), np.nan)
    chosen = np.asarray(EntropyBound(1.0)(view(np.full((1, 4), 0.5), np.ones((1, 4), bool), logits=logits)))
    assert chosen.sum() == 1


def test_the_last_step_commits_also_what_a_broken_model_gives_no_score():
    broken = view(np.full((1, 4), 0.5), np.ones((1, 4), bool), logits=np.full((1, 4, 3), np.nan))
    assert np.asarray(DiffuLLaMAConfidence()(broken)).all()


def test_the_entropy_bound_leaves_out_the_largest():
    p = np.array([[[0.9, 0.1], [0.5, 0.5], [0.99, 0.01], [0.8, 0.2]]])
    h = np.sort(-np.sum(p * np.log(p), -1)[0])
    for nats in (0, h[0] + 1e-4, h[:2].sum() + 1e-4, h[:2].sum() - 1e-4, 9):
        chosen = EntropyBound(nats)(view(p.max(-1), logits=np.log(p)))
        assert chosen.sum() == max(k for k in range(1, 5) if h[:k].sum() - h[k - 1] <= nats)


def test_ties_go_to_the_earlier_position_and_masked_positions_come_first():
    found = rank(jnp.array([[0.5, 0.5, 0.9, jnp.nan, 0.5]]), jnp.array([[1, 1, 0, 1, 1]], bool))
    np.testing.assert_array_equal(found, [[0, 1, 4, 3, 2]])


EXAMPLES = [text for _, example in SELECTORS.values() for text in example.split(" or ")]


@pytest.mark.parametrize("text", EXAMPLES)
def test_every_example_in_the_table_parses_and_is_hashable(text):
    assert parse_unmasking(text) == parse_unmasking(text) and hash(parse_unmasking(text).selector) is not None


@pytest.mark.parametrize("revision", [example for _, example in REVISIONS.values()])
def test_revisions_follow_a_plus(revision):
    [found] = parse_unmasking(f"threshold:0.9+{revision}").revisions
    assert type(found).__name__.lower() == revision.partition(":")[0]


@pytest.mark.parametrize("name", ("", "best", "Confidence", "confidence:2", "threshold", "threshold:", "threshold:x",
                                  "threshold:1.5", "threshold:-0.1", "threshold:nan", "factor:0", "factor:-1",
                                  "entropy_bound:-1", "random:even", "left_to_right:", "threshold:0.9+",
                                  "threshold:0.9+remask", "threshold:0.9+edit:2", "confidence+confidence",
                                  "speculate:0", "speculate:x", "speculate:65", "speculate+edit:0.9",
                                  "jacobi:1", "jacobi:513", "jacobi:x", "jacobi:8+remask:0.1",
                                  "diffullama_confidence:0"))
def test_text_that_is_no_unmasking_strategy_is_refused(name):
    with pytest.raises(UserError):
        parse_unmasking(name)
