"""Rotary positions against transformers' formulas and the definition of a rotation."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.aot.topology import compile_for_chip
from dlm_jax.attention.qk_norm import norm_and_rotate_heads
from dlm_jax.attention.qk_norm_tpu import norm_and_rotate_tpu
from dlm_jax.attention.rope import rotate
from dlm_jax.attention.rope_tpu import rotate_tpu, tokens_in_vmem
from dlm_jax.models.config import Rope
from dlm_jax.models.transformer import rope_frequencies


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


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'dlm-jax[tpu]'")
@pytest.mark.parametrize("topology, dtype, heads", [
    ("v4:2x2x1", "bfloat16", 32), ("v5e:2x2", "float32", 32), ("v6e:2x2", "bfloat16", 64)])
def test_the_tpu_compiler_accepts_the_kernel_at_every_width(topology, dtype, heads):
    q, k = (jax.ShapeDtypeStruct((2, 256, h, 128), dtype) for h in (heads, 32))
    assert tokens_in_vmem((heads + 32) * 128, q.dtype.itemsize) % 8 == 0
    angles, scale = jax.ShapeDtypeStruct((1, 256, 64), "float32"), jax.ShapeDtypeStruct((128,), "float32")
    compile_for_chip(topology, rotate_tpu, q, k, angles)

    def gradients(q, k, angles, *scales):
        out, back = jax.vjp(lambda q, k, *scales: norm_and_rotate_tpu(q, k, angles, *scales, 1e-6), q, k, *scales)
        return back(out)

    compile_for_chip(topology, gradients, q, k, angles, scale, scale)


@pytest.mark.parametrize("batch, n, head_dim", [(1, 130, 128), (2, 128, 128), (2, 40, 256)])
def test_the_kernel_rotates_as_the_formula_and_so_do_its_gradients(batch, n, head_dim):
    random = np.random.default_rng(1)
    q, k, dq, dk = (jnp.asarray(random.standard_normal((2, n, heads, head_dim)), jnp.float32) for heads in (4, 2, 4, 2))
    angles = jnp.asarray(random.standard_normal((batch, n, head_dim // 2)) * 9, jnp.float32)
    expected, back = jax.vjp(lambda q, k: (rotate(q, angles), rotate(k, angles)), q, k)
    found, found_back = jax.vjp(lambda q, k: rotate_tpu(q, k, angles, interpret=True), q, k)
    for a, b in zip((*found, *found_back((dq, dk))), (*expected, *back((dq, dk)))):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("batch, n, head_dim", [(1, 130, 128), (2, 128, 128), (2, 40, 256)])
def test_the_kernel_of_the_norm_computes_as_the_formula_and_so_do_its_gradients(batch, n, head_dim):
    random = np.random.default_rng(1)
    q, k, dq, dk = (jnp.asarray(3 * random.standard_normal((2, n, heads, head_dim)), jnp.float32)
                    for heads in (4, 2, 4, 2))
    scales = [jnp.asarray(random.standard_normal(head_dim), jnp.float32) for _ in range(2)]
    angles = jnp.asarray(random.standard_normal((batch, n, head_dim // 2)) * 9, jnp.float32)
    expected, back = jax.vjp(lambda *x: norm_and_rotate_heads(*x, angles, 1e-6), q, k, *scales)
    found, found_back = jax.vjp(lambda q, k, *scales: norm_and_rotate_tpu(q, k, angles, *scales, 1e-6, interpret=True),
                                q, k, *scales)
    for a, b in zip((*found, *found_back((dq, dk))), (*expected, *back((dq, dk))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)
