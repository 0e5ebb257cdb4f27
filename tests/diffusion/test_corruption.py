"""Which tokens are masked: rates, exact counts, tabulated marginals, and what is never masked."""

import jax
import numpy as np
import pytest

from dlm_jax.diffusion.corruption import block_lengths, position_dependent, uniform
from dlm_jax.segments import predictable

# Marginal mask probability at index 0, B/4-1, B/2-1, 3B/4-1, B-1 of a block of B tokens, t uniform in (1e-3, 1); from
# an independent simulation of 100,000 blocks, rounded to 0.001.
MARGINALS = {
    (16, 0.25): (0.373, 0.414, 0.481, 0.562, 0.656),
    (16, 0.10): (0.268, 0.327, 0.446, 0.624, 0.834),
    (16, 0.05): (0.192, 0.260, 0.420, 0.683, 0.924),
    (32, 0.25): (0.373, 0.419, 0.486, 0.566, 0.660),
    (32, 0.10): (0.265, 0.332, 0.452, 0.636, 0.844),
    (32, 0.05): (0.190, 0.265, 0.432, 0.699, 0.934),
    (64, 0.25): (0.371, 0.422, 0.489, 0.571, 0.664),
    (64, 0.10): (0.262, 0.336, 0.458, 0.643, 0.850),
    (64, 0.05): (0.188, 0.271, 0.440, 0.711, 0.940),
}
TABLE_BLOCKS = 100_000

masked_by_position = jax.jit(position_dependent, static_argnums=(3,))
masked_uniformly = jax.jit(uniform)


def test_uniform_masks_at_its_rate_and_each_token_independently():
    t = np.repeat([[0.1, 0.5, 0.9, 1.0]], 20_000, axis=0).astype(np.float32)
    masked = np.asarray(masked_uniformly(jax.random.key(0), t))
    np.testing.assert_allclose(masked.mean(0), t[0], atol=4 * 0.5 / np.sqrt(len(t)))
    assert masked[:, 3].all()
    assert np.abs(np.corrcoef(masked[:, :3].T) - np.eye(3)).max() < 0.03


@pytest.mark.parametrize("block", [16, 32, 64])
def test_position_dependent_marginals_match_the_table(block):
    blocks, indices = 20_000, np.array([0, block // 4 - 1, block // 2 - 1, 3 * block // 4 - 1, block - 1])
    t = 1e-3 + (1 - 1e-3) * np.random.default_rng(block).random((blocks, 1), np.float32)
    t = np.broadcast_to(t, (blocks, block))
    offset_in_block = np.broadcast_to(np.arange(block), t.shape)
    for half_life in (0.25, 0.10, 0.05):
        masked = np.asarray(masked_by_position(jax.random.key(1), t, offset_in_block, block, half_life))
        expected = np.array(MARGINALS[block, half_life])
        error = np.sqrt(expected * (1 - expected) * (1 / blocks + 1 / TABLE_BLOCKS)) + 0.0005
        assert np.all(np.abs(masked.mean(0)[indices] - expected) < 3 * error)
        assert abs(masked.mean() - 0.5) < 0.01


def test_position_dependent_masks_round_t_times_length_tokens_of_each_block():
    # Documents restart the blocks: blocks of 4, a last one that is short, a document of one token.
    rows = np.array([[0, 1, 2, 3, 0, 1, 0, 1, 2, 3, 0, 0, 1, 2]] * 200)
    bounds = [0, 4, 6, 10, 11, 14]
    levels = np.random.default_rng(0).random((len(rows), len(bounds) - 1), np.float32)
    lengths = np.diff(bounds)
    t = np.repeat(levels, lengths, axis=1)
    masked = np.asarray(masked_by_position(jax.random.key(2), t, rows, 4, 0.1))
    counts = np.add.reduceat(masked, bounds[:-1], axis=1)
    np.testing.assert_array_equal(counts, np.round(levels * lengths))


def test_a_long_half_life_masks_uniformly_and_a_short_one_masks_the_last_tokens():
    t = np.full((4000, 8), 0.5, np.float32)
    offset_in_block = np.broadcast_to(np.arange(8), t.shape)
    flat = masked_by_position(jax.random.key(3), t, offset_in_block, 8, 1e6).mean(0)
    np.testing.assert_allclose(flat, 0.5, atol=0.04)
    last = masked_by_position(jax.random.key(3), t, offset_in_block, 8, 1e-3)
    np.testing.assert_array_equal(last, offset_in_block >= 4)


def test_block_lengths_are_those_of_full_and_of_short_blocks():
    offset_in_block = np.array([[0, 1, 2, 0, 1, 0, 0, 1, 2], [0, 1, 2, 3, 4, 5, 6, 7, 8]])
    np.testing.assert_array_equal(block_lengths(offset_in_block), [[3, 3, 3, 2, 2, 1, 3, 3, 3], [9] * 9])


def test_first_tokens_of_documents_and_padding_are_not_predictable():
    segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [5] * 8, [0] * 8])
    expected = [[0, 1, 1, 0, 0, 1, 0, 0], [0] + [1] * 7, [0] * 8]
    np.testing.assert_array_equal(predictable(segments), np.array(expected, bool))
