"""Jacobi forcing against the iteration written out: one document, one block at a time, in one causal stream."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.attention.rules import Causal
from dlm_jax.attention.visibility import training_rule
from dlm_jax.diffusion.noise import add_noise
from dlm_jax.diffusion.recipes import recipe
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.objective.jacobi import ITERATIONS, iterate_guesses
from dlm_jax.objective.loss import loss_sums

BLOCKS = dataclasses.replace(recipe("jacobi_forcing"), block_size=4)
SEGMENTS = np.array([[1] * 11 + [0], [1] * 5 + [2] * 7])


def test_the_end_of_each_block_is_masked_and_never_a_prompt_or_padding():
    segments = np.repeat(SEGMENTS, 40, 0)
    batch = add_noise(jax.random.key(0), jnp.zeros(segments.shape, int), segments, BLOCKS)
    offset = np.asarray(batch.documents.positions) % 4
    inside = (offset[:, 1:] != 0) & np.asarray(batch.targets)[:, :-1] & np.asarray(batch.targets)[:, 1:]
    masked = np.asarray(batch.masked)
    assert not (masked[:, :-1] & ~masked[:, 1:] & inside).any() and not (masked & ~np.asarray(batch.targets)).any()
    assert 0.4 < masked.sum() / np.asarray(batch.targets).sum() < 0.6


def next_log_p(config, params, text):
    hidden = forward(params, jnp.asarray([text]), config=config, rule=Causal())
    return np.asarray(jax.nn.log_softmax(unembed(params, hidden, config)))[0]


def test_guesses_and_losses_are_those_of_the_iteration_of_an_autoregressive_model(random_model):
    config, params = random_model("llama")
    tokens = np.random.default_rng(0).integers(0, 30, SEGMENTS.shape)
    rule, batch = training_rule(BLOCKS, 12), add_noise(jax.random.key(3), tokens, SEGMENTS, BLOCKS)
    found = iterate_guesses(params, batch, rule, BLOCKS, config)
    loss = 0.0
    for row, document, masked, random, guesses in zip(tokens, SEGMENTS, *map(np.asarray, (
            batch.masked, batch.guesses, found.guesses))):
        assert set(random) <= set(row) and (random != row).any()
        for number in set(document) - {0}:
            here = document == number
            for start in range(0, here.sum(), 4):
                hidden, clean, guess = masked[here][:start + 4], row[here][:start + 4], random[here][:start + 4]
                for _ in range(ITERATIONS):
                    text = np.where(hidden & (np.arange(len(clean)) >= start), guess, clean)
                    guess = np.concatenate([text[:1], next_log_p(config, params, text).argmax(-1)[:-1]])
                ours = guesses[here][:start + 4]
                np.testing.assert_array_equal(np.where(hidden, ours, 0)[start:], np.where(hidden, guess, 0)[start:])
                text = np.where(hidden & (np.arange(len(clean)) >= start), guess, clean)
                log_p = next_log_p(config, params, text)
                loss -= sum(log_p[i - 1, clean[i]] for i in range(start, len(clean)) if hidden[i])
    sums = loss_sums(params, found, rule, None, BLOCKS, config)
    np.testing.assert_allclose(sums.masked_loss, loss, rtol=1e-5)


def test_no_gradient_passes_through_the_guesses(random_model):
    config, params = random_model("llama")
    tokens = np.random.default_rng(0).integers(0, 30, SEGMENTS.shape)
    rule, batch = training_rule(BLOCKS, 12), add_noise(jax.random.key(3), tokens, SEGMENTS, BLOCKS)
    guesses = iterate_guesses(params, batch, rule, BLOCKS, config).guesses

    def loss(params, fixed):
        noisy = dataclasses.replace(batch, guesses=guesses) if fixed else iterate_guesses(
            params, batch, rule, BLOCKS, config)
        return loss_sums(params, noisy, rule, None, BLOCKS, config).loss

    for a, b in zip(*(jax.tree.leaves(jax.grad(loss)(params, fixed)) for fixed in (True, False))):
        np.testing.assert_allclose(a, b, atol=1e-6)
