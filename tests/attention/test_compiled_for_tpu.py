"""The TPU kernels through the real TPU compiler, which needs libtpu but no TPU."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import pytest

from dlm_jax.aot.topology import compile_for_chip
from dlm_jax.attention.dispatch import attend
from dlm_jax.attention.rules import Annealed, BlockDiffusion, Causal, Rule

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                       reason="libtpu, the TPU compiler, is not installed: pip install 'dlm-jax[tpu]'")]
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def compiled(chip: str, rule: Rule, length: int, d: int = 128, heads: int = 4, kv_heads: int = 1, batch: int = 1,
             dtype=jnp.bfloat16, packed: bool = False, implementation: str = "auto"):
    """The compiled program of attention and its gradients over a stream of `length` tokens."""
    def step(q, k, v, *segments):
        def total(q, k, v):
            return jnp.sum(attend(q, k, v, rule, *segments, implementation=implementation).astype(jnp.float32))

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    shapes = [jax.ShapeDtypeStruct((batch, length, n, d), dtype) for n in (heads, kv_heads, kv_heads)]
    segments = [jax.ShapeDtypeStruct((batch, length), jnp.int32)] * packed
    return compile_for_chip(TOPOLOGIES[chip], step, *shapes, *segments)


def kernels_in(program) -> set[str]:
    return {name for name in ("attention_forward", "attention_backward", "splash") if name in program.as_text()}


@pytest.mark.parametrize("chip", [
    chip if chip == "v5e" else pytest.param(chip, marks=pytest.mark.slow) for chip in TOPOLOGIES])
def test_auto_picks_our_kernel_on_every_generation(chip):
    assert kernels_in(compiled(chip, BlockDiffusion(256, 32), 512, packed=True)) == {
        "attention_forward", "attention_backward"}


@pytest.mark.parametrize("chip", [pytest.param("v4", marks=pytest.mark.slow), "v6e"])
def test_annealing_compiles_into_the_kernel_and_needs_no_mask_in_memory(chip):
    length = 2048
    program = compiled(chip, Annealed(jnp.float32(0.3), jnp.uint32(1)), length, heads=1)
    assert kernels_in(program) == {"attention_forward", "attention_backward"}
    assert program.memory_analysis().temp_size_in_bytes < length**2


@pytest.mark.parametrize("d, heads, dtype", [(64, 1, jnp.bfloat16), (96, 2, jnp.bfloat16), (256, 8, jnp.bfloat16),
                                             (128, 2, jnp.float32),
                                             pytest.param(128, 32, jnp.bfloat16, marks=pytest.mark.slow)])
def test_head_dims_ratios_and_dtypes_compile(d, heads, dtype):
    compiled("v5e", Causal(), 300, d=d, heads=heads, dtype=dtype)


@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5p", "tpu7x"])
def test_temporary_memory_is_at_most_that_of_splash(chip):
    ours, splash = (compiled(chip, BlockDiffusion(1024, 32), 2048, heads=8, kv_heads=2, batch=2, implementation=name)
                    for name in ("tpu", "splash"))
    assert kernels_in(splash) == {"splash"}
    assert ours.memory_analysis().temp_size_in_bytes <= splash.memory_analysis().temp_size_in_bytes


def test_fewer_queries_than_a_tile_fall_back_to_the_reference():
    assert not kernels_in(compiled("v5e", Causal(), 64))


@pytest.mark.kernels
@pytest.mark.parametrize("chip, length, d, heads", list(itertools.product(
    TOPOLOGIES, [1024, 4096, 8192], [64, 96, 128, 256], [2, 8])))
def test_the_full_table_compiles(chip, length, d, heads):
    program = compiled(chip, BlockDiffusion(length, 32), 2 * length, d=d, heads=heads, kv_heads=2, packed=True)
    assert kernels_in(program) == {"attention_forward", "attention_backward"}
