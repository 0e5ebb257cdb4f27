"""Rotary positions against transformers' formulas and the definition of a rotation."""

import numpy as np
import pytest

from dlm_jax.models.config import Rope
from dlm_jax.models.transformer import rope_frequencies, rotate


def theirs(kind: str, head_dim: int, **fields) -> np.ndarray:
    """The inverse frequencies of transformers."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=131_072,
        rope_parameters={"rope_type": kind, **fields})
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    assert scale == 1.0
    return frequencies.numpy()


@pytest.mark.parametrize("head_dim, theta, factor, low, high, original", [
    (128, 500_000.0, 8.0, 1.0, 4.0, 8192), (64, 500_000.0, 32.0, 1.0, 4.0, 8192), (12, 10_000.0, 4.0, 2.0, 3.0, 32)])
def test_llama3_scaling_matches_transformers(head_dim, theta, factor, low, high, original):
    rope = Rope(theta, "llama3", factor, low, high, original)
    expected = theirs("llama3", head_dim, rope_theta=theta, factor=factor, low_freq_factor=low, high_freq_factor=high,
                      original_max_position_embeddings=original)
    np.testing.assert_allclose(rope_frequencies(rope, head_dim), expected, rtol=1e-5)


@pytest.mark.parametrize("head_dim, theta, factor", [(128, 10_000.0, 2.0), (10, 1_000_000.0, 3.5)])
def test_linear_scaling_matches_transformers(head_dim, theta, factor):
    expected = theirs("linear", head_dim, rope_theta=theta, factor=factor)
    np.testing.assert_allclose(rope_frequencies(Rope(theta, "linear", factor), head_dim), expected, rtol=1e-6)


def test_unscaled_frequencies_fall_geometrically_from_one():
    np.testing.assert_allclose(rope_frequencies(Rope(theta=81.0), 8), 1 / np.array([1, 3, 9, 27]), rtol=1e-6)


def test_rotate_turns_each_plane_of_the_half_split_layout():
    random = np.random.default_rng(0)
    x, angles = random.standard_normal((1, 3, 2, 6)).astype(np.float32), random.standard_normal((1, 3, 3))
    planes = x[..., :3] + 1j * x[..., 3:]
    turned = planes * np.exp(1j * angles)[:, :, None]
    np.testing.assert_allclose(rotate(x, angles), np.concatenate([turned.real, turned.imag], -1), atol=1e-5)
