"""The hash of words."""

import jax
import numpy as np

from dlm_jax.hashing import hash32


def test_hash32_maps_small_numbers_to_distinct_ones_with_balanced_bits():
    hashed = np.asarray(jax.jit(hash32)(np.arange(1 << 16)))
    assert len(np.unique(hashed)) == 1 << 16
    bits = (hashed[:, None] >> np.arange(32)) & 1
    assert abs(bits.mean(0) - 0.5).max() < 0.01
