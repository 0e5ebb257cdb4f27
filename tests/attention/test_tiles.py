"""Tiles and runs of keys, from intervals alone, against the dense mask: nothing visible is missed, and nothing empty is
visited."""

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.plan import make_plan, visible_pairs
from dlm_jax.attention.rules import Annealed, Bidirectional, BlockCausal, BlockDiffusion, Causal, LookAhead
from dlm_jax.attention.tiles import TILE, coarsen, static_kv_runs

CASES = range(12)


def random_case(seed: int):
    """(rule, segments or None, length): documents of random lengths, some padding, lengths that do not fill a tile."""
    random = np.random.default_rng(seed)
    length, block = int(random.integers(30, 700)), int(random.choice([1, 3, 16, 32, 100]))
    rules = [Causal(), Bidirectional(), BlockCausal(block), BlockDiffusion(length, block),
             BlockDiffusion(length, block, "token_causal"), LookAhead(jnp.int32(block)),
             Annealed(jnp.float32(0.3), jnp.uint32(seed))]
    rule = rules[seed % len(rules)]
    streams = 2 if isinstance(rule, BlockDiffusion) else 1
    if seed % 3 == 0:
        return rule, None, streams * length
    cuts = random.random((2, length)) < random.choice([0.003, 0.02, 0.1])
    segments = np.cumsum(cuts, 1) + 1
    segments[:, length - int(random.integers(0, length // 3)):] = 0
    return rule, np.tile(segments, (1, streams)).astype(np.int32), streams * length


@pytest.mark.parametrize("ahead", (0, 1, 5, 40))
def test_looking_ahead_a_token_sees_the_past_and_so_many_of_the_next_in_its_document(ahead):
    segments = np.repeat([1, 2], (13, 19))[None]
    visible = np.asarray(make_plan(LookAhead(jnp.int32(ahead)), 32, jnp.asarray(segments)).visible(np.arange(32)))[0]
    query, key = np.mgrid[:32, :32]
    np.testing.assert_array_equal(visible, (key <= query + ahead) & (segments[0][query] == segments[0][key]))


def plan_and_mask(seed: int):
    rule, segments, length = random_case(seed)
    plan = make_plan(rule, length, None if segments is None else jnp.asarray(segments))
    return plan, np.asarray(plan.visible(np.arange(length)))


def test_the_tiles_within_a_later_document_are_full():
    segments = np.repeat([[1, 2]], 2 * TILE, 1)
    bounds = np.asarray(make_plan(Bidirectional(), 4 * TILE, segments).tiles)
    np.testing.assert_array_equal(bounds[0, 0], [[0, 0, 2, 2]] * 2 + [[2, 2, 4, 4]] * 2)


def tile_of(mask: np.ndarray, i: int, j: int, rows: int) -> np.ndarray:
    return mask[:, i * rows:(i + 1) * rows, j * TILE:(j + 1) * TILE]


@pytest.mark.parametrize("seed", CASES)
def test_a_tile_is_visited_if_it_shows_something_and_full_if_it_hides_nothing(seed):
    plan, mask = plan_and_mask(seed)
    bounds = np.asarray(plan.tiles)
    assert bounds.dtype == np.int32 and (np.diff(bounds, axis=-1) >= 0).all()
    keys = mask.shape[2]
    for i, j in np.ndindex(bounds.shape[2], -(-keys // TILE)):
        tile = tile_of(mask, i, j, TILE)
        first, full, full_end, end = np.moveaxis(bounds[:, :, i], -1, 0)
        visits, fulls = ((first <= j) & (j < end)).any(1), ((full <= j) & (j < full_end)).any(1)
        np.testing.assert_array_equal(visits, tile.any((1, 2)))
        np.testing.assert_array_equal(tile[fulls], True)
        if not plan.edges and tile.shape[2] == TILE and bounds.shape[1] == 1:
            np.testing.assert_array_equal(fulls, tile.all((1, 2)))


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("times", [2, 4])
def test_coarser_tiles_miss_nothing_and_are_full_only_where_nothing_is_hidden(seed, times):
    plan, mask = plan_and_mask(seed)
    bounds = np.asarray(coarsen(plan.tiles, times))
    for i, j in np.ndindex(bounds.shape[2], -(-mask.shape[2] // TILE)):
        tile = tile_of(mask, i, j, TILE * times)
        first, full, full_end, end = np.moveaxis(bounds[:, :, i], -1, 0)
        visits, fulls = ((first <= j) & (j < end)).any(1), ((full <= j) & (j < full_end)).any(1)
        assert (visits >= tile.any((1, 2))).all()
        np.testing.assert_array_equal(tile[fulls], True)


@pytest.mark.parametrize("seed", CASES)
def test_no_pair_is_visible_in_two_regions(seed):
    plan, mask = plan_and_mask(seed)
    if plan.edges is None:
        assert int((plan.hi - plan.lo).sum()) * mask.shape[0] == mask.sum() * plan.lo.shape[0]


@pytest.mark.parametrize("seed", CASES)
@pytest.mark.parametrize("chunk", [16, 64])
def test_static_kv_runs_contain_every_visible_key(seed, chunk):
    plan, mask = plan_and_mask(seed)
    if plan.rule is None:
        return
    runs = static_kv_runs(plan.rule, mask.shape[2], chunk)
    for i, seen in enumerate(runs):
        hidden = np.ones(mask.shape[2], bool)
        for lo, hi in seen:
            assert 0 <= lo < hi <= mask.shape[2]
            hidden[lo:hi] = False
        assert not mask[:, i * chunk:(i + 1) * chunk][:, :, hidden].any()


def test_the_runs_of_clean_tokens_have_no_noisy_key_and_those_of_noisy_tokens_only_their_block():
    runs = static_kv_runs(BlockDiffusion(256, 16), 512, 64)
    assert runs[4:] == tuple(((256, min(256 + 64 * i + 64 + 15, 512)),) for i in range(4))
    assert runs[2][0] == (128 - 15, 192 + 15)


@pytest.mark.parametrize("seed", CASES)
def test_visible_pairs_are_those_of_the_mask(seed):
    rule, segments, length = random_case(seed)
    pairs = np.asarray(visible_pairs(rule, length, None if segments is None else jnp.asarray(segments)))
    mask = plan_and_mask(seed)[1]
    if isinstance(rule, Annealed):
        causal = np.asarray(visible_pairs(Causal(), length, None if segments is None else jnp.asarray(segments)))
        full = np.asarray(visible_pairs(Bidirectional(), length, None if segments is None else jnp.asarray(segments)))
        np.testing.assert_allclose(pairs, causal + 0.3 * (full - causal), rtol=1e-5)
    else:
        np.testing.assert_array_equal(pairs, mask.sum((1, 2)))


@pytest.mark.parametrize("length, most", [(1024, 1.30), (4096, 1.10)])
def test_two_streams_compute_few_more_pairs_than_are_visible(length, most):
    plan = make_plan(BlockDiffusion(length, 32), 2 * length)
    first, _, _, end = np.moveaxis(plan.tiles, -1, 0)
    computed = int((end - first).sum()) * TILE**2
    assert computed / visible_pairs(BlockDiffusion(length, 32), 2 * length)[0] <= most
