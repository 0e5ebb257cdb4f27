"""Every mask rule against a definition of visibility in plain Python, one pair of tokens at a time."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.plan import dense_mask
from dlm_jax.attention.rules import (
    Annealed,
    Bidirectional,
    BlockCausal,
    BlockDiffusion,
    Causal,
    CausalThenBlocks,
    CausalThenLastBlock,
)
from dlm_jax.segments import find_documents

# Rows of one length: documents of different lengths, one of a single token, with and without padding at the end.
SEGMENTS = np.array([[1] * 5 + [2] * 1 + [3] * 6 + [0] * 1, [4] * 13, [1] * 3 + [2] * 4 + [0] * 6, [0] * 13])
LENGTH = SEGMENTS.shape[1]


class Token(NamedTuple):
    """Where a token is, worked out by hand."""

    clean: bool  # whether it is in the clean half
    document: int  # 0 is padding
    position: int  # in its document
    index: int  # in the input


def tokens_of(row: np.ndarray, streams: int) -> list[Token]:
    """The tokens of one row of segments, in one or two streams."""
    row = row.tolist()
    return [Token(half == 1, document, i - row.index(document), half * len(row) + i)
            for half in range(streams) for i, document in enumerate(row)]


def block_diffusion(q: Token, k: Token, block: int) -> bool:
    """The three parts of the mask, as BD3-LM's section 3 lists them."""
    q_block, k_block = q.position // block, k.position // block
    if not q.clean and not k.clean:
        return k_block == q_block
    if not q.clean and k.clean:
        return k_block < q_block
    return k.clean and k_block <= q_block


DEFINITIONS = {
    "causal": (Causal(), 1, lambda q, k: k.position <= q.position),
    "bidirectional": (Bidirectional(), 1, lambda q, k: True),
    **{f"block_causal_{b}": (BlockCausal(b), 1, lambda q, k, b=b: k.position // b <= q.position // b)
       for b in (1, 3, 4, 20)},
    **{f"block_diffusion_{b}": (BlockDiffusion(LENGTH, b), 2, lambda q, k, b=b: block_diffusion(q, k, b))
       for b in (1, 3, 4, 20)},
    "last_block_20": (CausalThenLastBlock(20), 1, lambda q, k: True),
    "last_block_1": (CausalThenLastBlock(1), 1, lambda q, k: k.position <= q.position),
}


@pytest.fixture(scope="module")
def masks() -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """The masks of each rule: over SEGMENTS, over one document, and without segments."""
    @jax.jit
    def all_masks(segments):
        return {name: (dense_mask(rule, streams * LENGTH, jnp.tile(segments, (1, streams))),
                       dense_mask(rule, streams * LENGTH, jnp.ones((1, streams * LENGTH), int)),
                       dense_mask(rule, streams * LENGTH)) for name, (rule, streams, _) in DEFINITIONS.items()}

    return jax.device_get(all_masks(SEGMENTS))


@functools.partial(jax.jit, static_argnums=2)
def annealed_mask(probability, seed, length: int) -> jax.Array:
    return dense_mask(Annealed(probability, seed), length)[0]


def annealed(probability: float, seed: int, length: int = 100) -> np.ndarray:
    return np.asarray(annealed_mask(np.float32(probability), np.uint32(seed), length))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_rule_is_its_definition_in_packed_and_padded_rows(name, masks):
    _, streams, visible = DEFINITIONS[name]
    expected = [[[q.document == k.document != 0 and visible(q, k) for k in tokens_of(row, streams)]
                 for q in tokens_of(row, streams)] for row in SEGMENTS]
    np.testing.assert_array_equal(masks[name][0], expected)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_no_segments_is_one_document(name, masks):
    np.testing.assert_array_equal(masks[name][1], masks[name][2])


@pytest.mark.parametrize("name", ["causal", "bidirectional", "block_causal_3"])
def test_a_slice_of_queries_has_the_rows_of_the_full_mask(name, masks):
    part = jax.jit(lambda first: dense_mask(DEFINITIONS[name][0], LENGTH, jnp.asarray(SEGMENTS), 4, first))(5)
    np.testing.assert_array_equal(part, masks[name][0][:, 5:9])


@pytest.mark.parametrize("length, block", [(12, 1), (12, 3), (12, 4), (12, 12), (64, 16)])
def test_block_diffusion_shows_length_squared_plus_length_times_block_pairs(length, block):
    mask = np.asarray(jax.jit(lambda: dense_mask(BlockDiffusion(length, block), 2 * length))())
    assert int(mask.sum()) == length**2 + length * block


@pytest.mark.parametrize("streams", [1, 2])
def test_positions_restart_with_each_document_and_each_half(streams):
    found = jax.jit(lambda s: find_documents(streams * LENGTH, s, LENGTH).positions)(np.tile(SEGMENTS, (1, streams)))
    np.testing.assert_array_equal(found, [[p.position for p in tokens_of(row, streams)] for row in SEGMENTS])


def test_annealed_at_zero_is_causal_and_at_one_is_full():
    for seed in range(5):
        np.testing.assert_array_equal(annealed(0.0, seed), np.tri(100, dtype=bool))
        assert annealed(1.0, seed).all()


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_annealed_opens_that_fraction_of_the_future_and_never_closes_the_past(probability):
    mask = annealed(probability, 7, 400)
    future = ~np.tri(400, dtype=bool)
    assert mask[~future].all()
    error = np.sqrt(probability * (1 - probability) / future.sum())
    assert abs(mask[future].mean() - probability) < 4 * error
    # No query and no key is favored: every row and column with at least 100 future edges is near the fraction too.
    for axis in (0, 1):
        count = future.sum(axis)
        fraction = (mask & future).sum(axis)[count >= 100] / count[count >= 100]
        assert abs(fraction - probability).max() < 5 * np.sqrt(probability * (1 - probability) / 100)


def test_annealed_edges_are_determined_by_the_seed():
    np.testing.assert_array_equal(annealed(0.5, 3), annealed(0.5, 3))
    future = ~np.tri(100, dtype=bool)
    agreement = (annealed(0.5, 3) == annealed(0.5, 4))[future].mean()
    assert abs(agreement - 0.5) < 0.05


def test_annealed_only_opens_as_the_probability_grows():
    assert not (annealed(0.3, 1) & ~annealed(0.6, 1)).any()


def test_annealed_does_not_depend_on_64_bit_mode():
    narrow = annealed(0.5, 2**31 + 5)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(annealed(0.5, 2**31 + 5), narrow)


def test_the_last_block_sees_itself_entirely_and_all_before_it_is_causal():
    mask = np.asarray(dense_mask(CausalThenLastBlock(4), 10))[0]
    expected = np.tri(10, dtype=bool)
    expected[8:, 8:] = True
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(np.asarray(dense_mask(CausalThenLastBlock(4), 12))[0][8:, 8:], True)


@pytest.mark.parametrize("finished", [0, 4, 8])
def test_behind_a_finished_text_blocks_see_themselves_and_that_text_is_causal(finished):
    """As the clean and the noisy half of `BlockDiffusion` with a token-causal clean half see it at decoding time."""
    mask = np.asarray(dense_mask(CausalThenBlocks(4, np.array([[finished]])), 12))[0]
    expected = np.kron(np.tri(3, dtype=bool), np.ones((4, 4), bool))
    expected[:finished] = np.tri(12, dtype=bool)[:finished]
    np.testing.assert_array_equal(mask, expected)
