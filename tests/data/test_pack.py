"""Packing only rearranges: everything that goes in comes out, in order."""

import numpy as np
import pytest

from dlm_jax.data.pack import pack

BOS, EOS = 90, 91


def documents(seed):
    """Random documents, some empty; ids from 90 on do not occur."""
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 90, size=draw.integers(0, 15)).tolist() for _ in range(draw.integers(0, 12))]


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("bos, eos", [(BOS, EOS), (None, EOS), (BOS, None), (None, None)])
def test_packing_loses_and_reorders_nothing(seed, bos, eos):
    start, end = [[] if token is None else [token] for token in (bos, eos)]
    expected = [token for document in documents(seed) for token in [*start, *document, *end]]
    records = list(pack(documents(seed), 7, bos, eos))
    packed = [token for tokens, segments in records for token in tokens[segments > 0].tolist()]
    assert packed == expected
    assert len(records) == -(-len(expected) // 7)
    assert all(tokens.dtype == segments.dtype == np.int32 for tokens, segments in records)
    assert all(tokens.shape == segments.shape == (7,) for tokens, segments in records)


@pytest.mark.parametrize("seed", range(20))
def test_segments_mark_documents(seed):
    for tokens, segments in pack(documents(seed), 7, BOS, EOS):
        real = segments > 0
        starts = (tokens == BOS)[real]
        starts[0] = True  # a record may start in the middle of a document
        assert segments[real].tolist() == np.cumsum(starts).tolist()


def test_only_the_end_of_the_last_record_is_padded():
    *full, last = pack([[1] * 5, [2] * 6], 4, None, None)
    assert all((segments > 0).all() for _, segments in full)
    assert last[0].tolist() == [2, 2, 2, 0] and last[1].tolist() == [1, 1, 1, 0]


def test_a_record_does_not_change_after_it_was_yielded():
    records = list(pack(iter([[1, 2, 3, 4], [5, 6]]), 2, None, None))
    assert [tokens.tolist() for tokens, _ in records] == [[1, 2], [3, 4], [5, 6]]
