"""Batches of a model's own texts: the states in which they were written, and the policy gradient's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.visibility import denoising_rule, training_rule
from dlm_jax.diffusion.recipes import Recipe
from dlm_jax.diffusion.trajectory import advantages, steps_of_blocks, trajectory_batch
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.objective.loss import loss_sums

MASK, BLOCK = 30, 4
# Two texts of prompt and answer, and the step that wrote each token: blocks [0, 4), [4, 8), [8, 12).
COMMIT = np.array([[0, 0, 1, 2, 4, 3, 4, 3, 5, 5, 5, 5], [0, 0, 0, 0, 1, 1, 2, 3, 0, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[1] * 12, [1] * 8 + [0] * 4], np.int32)


def test_the_steps_of_a_block_are_counted_within_it():
    first, count = steps_of_blocks(COMMIT, BLOCK)
    np.testing.assert_array_equal(first[:, ::BLOCK], [[1, 3, 5], [0, 1, 0]])
    np.testing.assert_array_equal(count[:, ::BLOCK], [[2, 2, 1], [0, 3, 0]])
    first, count = steps_of_blocks(COMMIT, 0)
    assert (first[:, 0].tolist(), count[:, 0].tolist()) == ([1, 1], [5, 3])


def test_what_a_step_wrote_and_what_was_written_later_is_masked():
    for seed in range(20):
        u = jax.random.uniform(jax.random.key(seed), (2, 1))
        batch = trajectory_batch(u, COMMIT, SEGMENTS, COMMIT, jnp.ones(2), BLOCK)
        masked, weight = np.array(batch.masked), np.array(batch.weight)
        assert not masked[COMMIT == 0].any() and not weight[~masked].any()
        for row, start in ((0, 0), (0, 4), (0, 8), (1, 4)):
            block = slice(start, start + BLOCK)
            chosen = set(COMMIT[row, block][weight[row, block] > 0])
            assert len(chosen) == 1
            expected = COMMIT[row, block] >= chosen.pop()
            np.testing.assert_array_equal(masked[row, block], expected & (COMMIT[row, block] > 0))


@pytest.mark.parametrize("alignment", ("shifted", "same_position"))
def test_the_loss_estimates_the_log_probability_of_the_path_without_bias(random_model, alignment):
    """Every step of every block is equally likely, so the mean over one draw of each is the sum over the path."""
    config, params = random_model("qwen2")
    recipe = Recipe("path", 2, alignment, block_size=BLOCK)
    tokens = np.random.default_rng(0).integers(0, 30, COMMIT.shape).astype(np.int32)
    advantage = jnp.array([0.5, -2.0])

    def loss(u):
        batch = trajectory_batch(jnp.full((2, 1), u), tokens, SEGMENTS, COMMIT, advantage, BLOCK)
        return float(loss_sums(params, batch, training_rule(recipe, 12), MASK, recipe, config).loss)

    estimate = np.mean([loss((i + 0.5) / 6) for i in range(6)])  # 6 is a multiple of all counts
    expected = 0.0
    for row, scale in enumerate(advantage):
        for step in range(1, COMMIT.max() + 1):
            now = np.flatnonzero(COMMIT[row] == step)
            if len(now):
                end = (now[0] // BLOCK + 1) * BLOCK
                state = np.where(COMMIT[row] >= step, MASK, tokens[row])[None, :end]
                hidden = forward(params, state, config=config, rule=denoising_rule("block_causal", BLOCK))
                log_p = jax.nn.log_softmax(unembed(params, hidden, config))[0]
                for i in now:
                    clean = alignment == "shifted" and i % BLOCK == 0
                    if clean:  # predicted by the last output of the block before, which is clean by then
                        hidden = forward(params, tokens[row:row + 1, :i], config=config,
                                         rule=denoising_rule("block_causal", BLOCK))
                        own = jax.nn.log_softmax(unembed(params, hidden, config))[0, -1]
                    else:
                        own = log_p[i - (alignment == "shifted")]
                    expected -= float(scale * own[tokens[row, i]])
    assert estimate == pytest.approx(expected, rel=1e-4)


def test_an_answer_is_compared_with_the_others_of_its_group():
    np.testing.assert_allclose(advantages(jnp.array([[1.0, 0, 0, 1], [1, 1, 1, 1]])),
                               [[0.5, -0.5, -0.5, 0.5], [0, 0, 0, 0]])
