"""The Hopper kernels through NVIDIA's own assembler, which needs the CUDA build of jax but no GPU."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from dlm_jax.aot.topology import compile_for_chip
from dlm_jax.attention.dispatch import attend
from dlm_jax.attention.rules import Annealed, BlockDiffusion, Causal, Rule

pytestmark = [
    pytest.mark.usefixtures("optimized"),
    pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None,
                       reason="the CUDA build of jax is not installed: pip install 'dlm-jax[gpu]'")]


def kernels_in(rule: Rule, length: int, d: int = 128, heads: int = 4, kv_heads: int = 1, dtype=jnp.bfloat16,
               packed: bool = False, topology: str = "h200:1") -> tuple[int, int]:
    """How many kernels a program of attention and its gradients has, and its temporary memory in bytes."""
    def step(q, k, v, *segments):
        def total(q, k, v):
            return jnp.sum(attend(q, k, v, rule, *segments).astype(jnp.float32))

        return jax.value_and_grad(total, argnums=(0, 1, 2))(q, k, v)

    shapes = [jax.ShapeDtypeStruct((1, length, n, d), dtype) for n in (heads, kv_heads, kv_heads)]
    program = compile_for_chip(topology, step, *shapes, *[jax.ShapeDtypeStruct((1, length), jnp.int32)] * packed)
    calls = sum("custom-call" in line and "mosaic_gpu" in line for line in program.as_text().splitlines())
    return calls, program.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("topology", ["h100:1", "h200:1"])
def test_auto_picks_our_kernel_forward_and_for_both_halves_backward(topology):
    assert kernels_in(BlockDiffusion(256, 32), 512, packed=True, topology=topology)[0] == 3


def test_annealing_compiles_into_the_kernel_and_needs_no_mask_in_memory():
    length = 4096
    calls, temporary = kernels_in(Annealed(jnp.float32(0.3), jnp.uint32(1)), length, heads=1)
    assert calls == 3 and temporary < length**2


@pytest.mark.parametrize("d, heads, dtype", [(64, 1, jnp.bfloat16), (96, 2, jnp.bfloat16), (128, 8, jnp.float16)])
def test_head_dims_ratios_and_dtypes_compile(d, heads, dtype):
    assert kernels_in(Causal(), 300, d=d, heads=heads, dtype=dtype)[0] == 3


def test_what_the_tensor_cores_cannot_multiply_falls_back_to_the_reference():
    assert kernels_in(Causal(), 256, dtype=jnp.float32)[0] == kernels_in(Causal(), 256, d=256)[0] == 0
