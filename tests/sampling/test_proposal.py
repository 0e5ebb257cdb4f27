"""Proposals against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.errors import UserError
from dlm_jax.sampling.proposal import Proposal, check_proposal, keep_min_p, keep_top_k, keep_top_p

V = 6
LOGITS = np.random.default_rng(0).normal(0, 1.5, V).astype(np.float32)


def softmax(x):
    e = np.exp(x - np.max(x))
    return e / e.sum()


def nucleus(logits, p):
    """The fewest largest entries whose probabilities reach p, found one by one."""
    probabilities, kept, total = softmax(logits), [], 0.0
    for token in np.argsort(-logits):
        kept.append(token)
        total += probabilities[token]
        if total >= p:
            return np.isin(np.arange(len(logits)), kept)
    return np.ones(len(logits), bool)


@pytest.mark.parametrize("k", range(V + 2))
def test_top_k_keeps_the_k_largest(k):
    kept = np.isfinite(keep_top_k(jnp.asarray(LOGITS), k))
    np.testing.assert_array_equal(kept, np.argsort(np.argsort(-LOGITS)) < (k or V))


@pytest.mark.parametrize("p", (0.01, 0.3, 0.5, 0.8, 0.95, 0.999, 1.0))
def test_top_p_keeps_the_smallest_set_that_holds_p(p):
    np.testing.assert_array_equal(np.isfinite(keep_top_p(jnp.asarray(LOGITS), p)), nucleus(LOGITS, p))


@pytest.mark.parametrize("kept", range(1, 33))
def test_top_p_tells_neighbouring_floats_apart(kept):
    bits = np.float32(1).view(np.int32) + np.random.default_rng(0).permutation(32).astype(np.int32)
    logits = bits.view(np.float32)  # 32 floats with none between them, all of a probability of 1/32
    found = np.isfinite(keep_top_p(jnp.asarray(logits), (kept - 0.5) / 32))
    np.testing.assert_array_equal(found, bits >= np.sort(bits)[-kept])


@pytest.mark.parametrize("p", (0.0, 0.05, 0.3, 1.0))
def test_min_p_keeps_tokens_at_least_p_times_as_probable_as_the_most_likely(p):
    probabilities = softmax(LOGITS)
    kept = np.isfinite(keep_min_p(jnp.asarray(LOGITS), p))
    np.testing.assert_array_equal(kept, probabilities >= p * probabilities.max())
    rows = jnp.stack([jnp.asarray(LOGITS), jnp.asarray(LOGITS)[::-1] * 0.5])  # each has a maximum of its own
    np.testing.assert_array_equal(keep_min_p(rows, p), jnp.stack([keep_min_p(row, p) for row in rows]))


@pytest.mark.parametrize("temperature,top_k,top_p", ((1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (0.7, 0, 0.8),
                                                     (1.5, 4, 0.9)))
def test_draws_follow_the_tempered_and_truncated_distribution(temperature, top_k, top_p):
    n = 20_000
    proposal = Proposal(temperature, top_k, top_p)
    tokens, confidence = proposal(jax.random.split(jax.random.key(0), (1, n)), jnp.broadcast_to(LOGITS, (1, n, V)))
    cut = LOGITS / temperature
    cut = np.where(cut >= np.sort(cut)[-top_k if top_k else 0], cut, -np.inf)
    cut = np.where(nucleus(cut, top_p), cut, -np.inf)
    frequency = np.bincount(np.asarray(tokens)[0], minlength=V) / n
    np.testing.assert_allclose(frequency, softmax(cut), atol=0.015)
    assert not np.any(frequency[np.isinf(cut)])
    np.testing.assert_allclose(confidence[0], softmax(LOGITS)[tokens[0]], rtol=1e-5)


def test_temperature_zero_takes_the_most_likely_token():
    tokens, confidence = Proposal()(jax.random.split(jax.random.key(0), (1, 1)), jnp.asarray(LOGITS)[None, None])
    assert int(tokens[0, 0]) == LOGITS.argmax() and np.isclose(confidence[0, 0], softmax(LOGITS).max())


@pytest.mark.parametrize("arguments", ({"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1},
                                       {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1}))
def test_parameters_outside_their_range_are_refused(arguments):
    with pytest.raises(UserError):
        check_proposal(**{"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | arguments)


def test_each_sequence_of_a_batch_draws_with_its_own_numbers():
    numbers = [(0.0, 0, 1.0, 0.0), (0.7, 3, 1.0, 0.0), (1.3, 0, 0.8, 0.0), (1.0, 0, 1.0, 0.3), (0.0, 2, 0.5, 0.1)]
    keys = jax.random.split(jax.random.key(0), (len(numbers), 50))
    logits = jnp.broadcast_to(LOGITS, (len(numbers), 50, V))
    together = Proposal(*(jnp.asarray(column)[:, None] for column in zip(*numbers)))(keys, logits)
    for i, row in enumerate(numbers):
        alone = Proposal(*row)(keys[i:i + 1], logits[i:i + 1])
        np.testing.assert_array_equal(together[0][i], alone[0][0])
        np.testing.assert_allclose(together[1][i], alone[1][0], rtol=1e-6)
