"""Alignment, and the chunked cross-entropy against the plain formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion import cross_entropy
from dlm_jax.diffusion.cross_entropy import (
    cross_entropy_sums,
    divergence_sum,
    shift,
    shift_two_streams,
    uncertainty,
)


def test_shift_puts_the_previous_hidden_state_at_each_position_and_zeros_at_the_first():
    hidden = np.arange(1.0, 13).reshape(2, 3, 2)
    np.testing.assert_array_equal(shift(hidden), [[[0, 0], [1, 2], [3, 4]], [[0, 0], [7, 8], [9, 10]]])
    first = np.array([[-1.0, -2], [-3, -4]])
    np.testing.assert_array_equal(shift(hidden, first)[:, 0], first)


def test_shifted_two_streams_predict_the_first_token_of_a_block_from_the_clean_half():
    noisy = np.arange(10.0).reshape(1, 10, 1)
    clean = 100 + noisy
    positions = np.array([[0, 1, 2, 3, 4, 5, 0, 1, 2, 3]])  # two documents, blocks of 4
    aligned = shift_two_streams(noisy, clean, positions, 4)[0, :, 0]
    np.testing.assert_array_equal(aligned, [0, 0, 1, 2, 103, 4, 105, 6, 7, 8])


def plain_sums(hidden, table, targets, weights) -> jax.Array:
    """The formula, with all the logits at once."""
    log_p = jax.nn.log_softmax(hidden @ table, axis=-1)
    losses = -jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0]
    return jnp.sum(weights * losses, axis=(1, 2))


@pytest.mark.parametrize("n, chunk", [(7, 3), (6, 2), (5, 1), (4, 100)])
def test_chunking_changes_neither_the_sums_nor_their_gradients(monkeypatch, n, chunk):
    b, vocab = 2, 11
    monkeypatch.setattr(cross_entropy, "LOGITS_BUDGET", chunk * b * vocab)
    random = np.random.default_rng(n)
    hidden, table = random.standard_normal((b, n, 3), np.float32), random.standard_normal((3, vocab), np.float32)
    targets = random.integers(0, vocab, (b, n))
    weights = (random.random((2, b, n)) * (random.random((2, b, n)) < 0.6)).astype(np.float32)

    def chunked(hidden, table):
        sums = cross_entropy_sums(hidden, targets, weights, lambda h: h @ table, vocab)
        return sums @ jnp.array([1.0, 0.3]), sums

    def plain(hidden, table):
        sums = plain_sums(hidden, table, targets, weights)
        return sums @ jnp.array([1.0, 0.3]), sums

    both = jax.jit(lambda *a: [jax.grad(f, argnums=(0, 1), has_aux=True)(*a) for f in (chunked, plain)])
    ours, theirs = both(hidden, table)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, theirs)


def test_chunking_does_not_change_the_divergence(monkeypatch):
    random = np.random.default_rng(0)
    hidden, teacher = random.standard_normal((2, 2, 7, 5), np.float32)
    weights = np.array(random.random((2, 7)) < 0.6, np.float32)
    whole = divergence_sum(hidden, teacher, weights, lambda h: h, lambda h: 2 * h, 5)
    monkeypatch.setattr(cross_entropy, "LOGITS_BUDGET", 2 * 2 * 5 * 3)  # three tokens per chunk
    chunked = divergence_sum(hidden, teacher, weights, lambda h: h, lambda h: 2 * h, 5)
    log_p, log_q = jax.nn.log_softmax(2 * teacher), jax.nn.log_softmax(hidden)
    np.testing.assert_allclose(whole, jnp.sum(weights[..., None] * jnp.exp(log_p) * (log_p - log_q)), rtol=1e-5)
    np.testing.assert_allclose(chunked, whole, rtol=1e-5)


def test_chunks_keep_the_logits_within_the_budget(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_BUDGET", 3 * 2 * 11)
    seen = []

    def unembed(hidden):
        seen.append(hidden.shape)
        return jnp.zeros((*hidden.shape[:2], 11))

    jax.eval_shape(lambda: cross_entropy_sums(jnp.zeros((2, 50, 4)), jnp.zeros((2, 50), int), jnp.ones((1, 2, 50)),
                                              unembed, 11))
    assert set(seen) == {(2, 2, 4)}  # 25 chunks without a rest, where 17 would do


def test_only_tokens_that_are_already_right_are_pressed_to_be_certain():
    logits = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3], [0.2, 0.5, 0.3]]))
    p = np.array([0.49, 0.04, 0.01]) / 0.54  # softmax(2 logits): the probabilities squared
    expected = [-np.sum(p * np.log(p)), 0, 0]
    np.testing.assert_allclose(uncertainty(logits, jnp.array([0, 2, 0])), expected, rtol=1e-6)


def test_an_extra_loss_is_summed_under_the_first_weighting(monkeypatch):
    monkeypatch.setattr(cross_entropy, "LOGITS_BUDGET", 30)  # one token per chunk
    logits = jax.random.normal(jax.random.key(0), (2, 5, 3))
    targets, weights = jnp.argmax(logits, -1).at[:, 0].set(0), jax.random.uniform(jax.random.key(1), (2, 2, 5))
    sums = cross_entropy_sums(logits, targets, weights, lambda h: h, 3, uncertainty)
    np.testing.assert_allclose(sums[:2], cross_entropy_sums(logits, targets, weights, lambda h: h, 3), rtol=1e-6)
    np.testing.assert_allclose(sums[2], jnp.sum(weights[0] * uncertainty(logits, targets)), rtol=1e-5)


def test_a_token_of_weight_zero_adds_nothing_even_where_its_loss_is_infinite():
    logits = jnp.array([[[0.0, 0.0], [-jnp.inf, 0.0]]])
    weights = jnp.array([[[1.0, 0.0]]])
    sums = jax.jit(lambda h: cross_entropy_sums(h, jnp.zeros((1, 2), int), weights, lambda h: h, 2))(logits)
    np.testing.assert_allclose(sums, [np.log(2)], rtol=1e-6)


@pytest.mark.parametrize("n, most, size", [
    (2048, 2097, 2048), (2048, 524, 512), (4096, 883, 512), (7, 3, 3), (5, 1, 1)])
def test_a_chunk_leaves_no_rest_where_the_tokens_can_be_so_divided(n, most, size):
    assert cross_entropy.chunk_size(n, most) == size
