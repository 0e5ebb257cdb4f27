"""What a recipe draws for a batch: counts, weights, prompts, pairs, and schedules."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.diffusion.noise import NoisyBatch, add_noise
from dlm_jax.diffusion.recipes import Recipe, recipe
from dlm_jax.diffusion.weighting import normalize_weights
from dlm_jax.segments import PROMPT_BIT

draw = jax.jit(add_noise, static_argnames="recipe")
ONE = Recipe("one", 1, "shifted")
TWO = Recipe("two", 2, "same_position", block_size=4)
SEGMENTS = np.array([[1] * 12, [1] * 7 + [2] * 3 + [0] * 2,
                     [1 + PROMPT_BIT] * 5 + [1] * 3 + [2 + PROMPT_BIT] * 2 + [2] * 2] * 20)
BLOCKS = {0: [0, 4, 8, 12], 1: [0, 4, 7, 10], 2: [0, 4, 8, 12]}  # where the blocks of each kind of row begin and end


def noised(chosen: Recipe, seed: int = 0, segments: np.ndarray = SEGMENTS, step: int | None = None) -> NoisyBatch:
    tokens = np.random.default_rng(seed).integers(0, 30, segments.shape)
    return jax.device_get(draw(jax.random.key(seed), tokens, segments, recipe=chosen,
                               step=None if step is None else jnp.int32(step)))


def blocks(batch: NoisyBatch):
    """(row, slice) of every block."""
    for row in range(len(batch.tokens)):
        ends = BLOCKS[row % 3]
        for first, end in zip(ends, ends[1:]):
            yield row, slice(first, end)


def test_a_prompt_is_never_masked_nor_a_target_and_belongs_to_the_document_of_its_answer():
    for chosen in (ONE, TWO, recipe("ar"), dataclasses.replace(recipe("hybrid_shifted"), block_size=4)):
        batch = noised(chosen)
        prompt = SEGMENTS >= PROMPT_BIT
        assert not (prompt & (batch.masked | batch.targets)).any()
        assert (prompt & (batch.weight > 0)).sum() == 0
        np.testing.assert_array_equal(batch.segments, SEGMENTS % PROMPT_BIT)
        assert batch.targets[2, 5:8].all() and batch.targets[2, 10:].all()


def test_the_levels_of_the_blocks_of_unbroken_rows_cover_every_stratum():
    t = noised(TWO, segments=np.ones((6, 12), int)).t[:, ::4]  # 3 blocks of 4 tokens in each of 6 rows
    assert sorted(np.floor(18 * (1 - (t - TWO.t_min) / (TWO.t_max - TWO.t_min)) + 1e-4).ravel()) == list(range(18))


@pytest.mark.parametrize("corruption, half_life", [("exact_count", 0), ("position_dependent", 0.1)])
@pytest.mark.parametrize("min_one_mask", [False, True])
def test_counts_are_exact_in_each_block_over_its_maskable_tokens(corruption, half_life, min_one_mask):
    batch = noised(dataclasses.replace(TWO, corruption=corruption, half_life=half_life, min_one_mask=min_one_mask))
    for row, block in blocks(batch):
        m, t = batch.targets[row, block].sum(), batch.t[row, block][0]
        assert batch.masked[row, block].sum() == max(np.round(t * m), min(m, int(min_one_mask)))


def test_min_one_mask_masks_at_least_one_token_of_each_block():
    few = dataclasses.replace(TWO, t_max=0.1)
    for min_one_mask in (False, True):
        batch = noised(dataclasses.replace(few, min_one_mask=min_one_mask))
        any_masked = [batch.masked[row, block].any() for row, block in blocks(batch) if batch.targets[row, block].any()]
        assert all(any_masked) == min_one_mask


def test_complementary_pairs_mask_every_target_once():
    chosen = dataclasses.replace(TWO, complementary=True, loss_weight="inverse_count")
    batch = noised(chosen)
    first, second = batch.masked[::2], batch.masked[1::2]
    assert len(batch.tokens) == 2 * len(SEGMENTS)
    np.testing.assert_array_equal(batch.tokens[::2], batch.tokens[1::2])
    np.testing.assert_array_equal(first ^ second, batch.targets[::2])
    assert not (first & second).any()
    np.testing.assert_allclose(batch.t[::2] + batch.t[1::2], 1, atol=1e-6)


def test_level_per_sequence_draws_one_level_per_row_inside_the_range():
    chosen = dataclasses.replace(TWO, level_per="sequence", t_min=0.3, t_max=0.8)
    t = noised(chosen).t
    assert all(len(set(row)) == 1 for row in t) and len(np.unique(t)) == len(t)
    assert 0.3 < t.min() < 0.32 and 0.78 < t.max() <= 0.8  # stratified over all 60 rows
    strata = np.floor((0.8 - np.sort(t[:, 0])) / 0.5 * len(t) + 1e-3)
    np.testing.assert_array_equal(np.sort(strata), np.arange(len(t)))


def test_inverse_counts_divide_the_targets_of_a_block_among_its_masked_tokens():
    batch = noised(dataclasses.replace(TWO, corruption="exact_count", loss_weight="inverse_count"))
    for row, block in blocks(batch):
        masked, m = batch.masked[row, block], batch.targets[row, block].sum()
        if masked.any():
            np.testing.assert_allclose(batch.weight[row, block], masked * m / masked.sum(), rtol=1e-6)
    # Over many draws a target weighs 1 on average where no block is left out: the loss is unbiased at each level.
    wide = np.ones((4000, 8), int)
    weights = noised(dataclasses.replace(TWO, corruption="exact_count", loss_weight="inverse_count", min_one_mask=True),
                     segments=wide).weight
    np.testing.assert_allclose(weights[:, 1:].mean(0), 1, atol=0.1)


def test_cart_sums_a_geometric_distribution_over_the_visible_tokens():
    batch = noised(dataclasses.replace(ONE, loss_weight="cart"))
    visible = (batch.segments > 0) & ~batch.masked
    expected = np.zeros(batch.weight.shape)
    for row, n in zip(*np.nonzero(batch.masked)):
        for i in np.flatnonzero(visible[row] & (batch.segments[row] == batch.segments[row, n])):
            expected[row, n] += 0.5 * 0.3 * 0.7 ** (abs(int(n) - int(i)) - 1)
    np.testing.assert_allclose(batch.weight, expected, atol=1e-6)


def test_one_masked_token_among_many_is_divided_by_one():
    masked, targets = jnp.zeros((2, 4), bool).at[1, 2].set(True), jnp.ones((2, 4), bool)
    weight = normalize_weights(masked.astype(jnp.float32), masked, targets, "masked")
    np.testing.assert_array_equal(weight, 8.0 * masked)
    assert not normalize_weights(jnp.zeros((2, 4)), jnp.zeros((2, 4), bool), targets, "masked").any()


def test_normalizers_divide_by_all_tokens_by_the_masked_or_by_the_masked_of_each_record():
    batches = {name: noised(dataclasses.replace(ONE, normalizer=name)) for name in ("tokens", "masked", "masked_each")}
    tokens, masked = batches["tokens"].targets.sum(), batches["tokens"].masked
    plain = np.where(masked, 1 / batches["tokens"].t, 0)
    np.testing.assert_allclose(batches["tokens"].weight, plain, rtol=1e-6)
    np.testing.assert_allclose(batches["masked"].weight / tokens, plain / masked.sum(), rtol=1e-5)
    each = plain / np.maximum(masked.sum(1, keepdims=True), 1) / len(masked)
    np.testing.assert_allclose(batches["masked_each"].weight / tokens, each, rtol=1e-5)


def test_noise_depends_only_on_key_step_and_shape():
    """Not on the tokens, the documents of other rows, or the number of devices."""
    for chosen in (ONE, dataclasses.replace(TWO, corruption="position_dependent", half_life=0.1)):
        one, other = noised(chosen), draw(jax.random.key(0), np.zeros_like(SEGMENTS), SEGMENTS, recipe=chosen)
        np.testing.assert_array_equal(one.masked, other.masked)
        changed = SEGMENTS.copy()
        changed[1:] = 1
        np.testing.assert_array_equal(noised(chosen, segments=changed).masked[0], one.masked[0])


def test_a_level_warmup_raises_the_levels_while_the_weights_are_one():
    chosen = dataclasses.replace(ONE, level_warmup=10)
    early, late, over = noised(chosen, step=0), noised(chosen, step=9), noised(chosen)
    assert early.t.max() <= 0.101 and late.t.max() > 0.9
    np.testing.assert_array_equal(early.weight, early.masked)
    np.testing.assert_array_equal(over.weight, np.where(over.masked, 1 / over.t, 0))
    np.testing.assert_array_equal(noised(chosen, step=10).weight, over.weight)


def test_position_dependence_grows_from_uniform_to_its_half_life():
    segments = np.ones((6000, 8), int)
    chosen = Recipe("p", 2, "same_position", "position_dependent", block_size=8, half_life=0.05, half_life_steps=100)
    last = [noised(chosen, segments=segments, step=step).masked[:, -1].mean() for step in (0, 49, 99)]
    assert last[0] < 0.56 < 0.62 < last[1] < last[2]
    over = noised(dataclasses.replace(chosen, half_life_steps=0), segments=segments)
    np.testing.assert_array_equal(noised(chosen, segments=segments, step=99).masked, over.masked)
