"""The TPU kernels, run in Pallas's interpreters, against dense attention in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from dlm_jax.attention.plan import Plan, make_plan
from dlm_jax.attention.reference import attend_reference
from dlm_jax.attention.rules import Annealed, Bidirectional, BlockCausal, BlockDiffusion, Causal, LookAhead
from dlm_jax.attention.tpu import Chip, attend_tpu
from dlm_jax.errors import UserError

CHIP = Chip(vmem=128 << 20, rows=256)
LENGTH = 149  # of the text: odd, and a little more than a tile
RULES = {
    "causal": Causal(),
    "bidirectional": Bidirectional(),
    "block_causal": BlockCausal(20),
    "block_diffusion": BlockDiffusion(LENGTH, 32),
    "token_causal": BlockDiffusion(LENGTH, 32, "token_causal"),
    "annealed": Annealed(np.float32(0.3), np.uint32(7)),
    "look_ahead": LookAhead(np.int32(11)),
}
# Documents that end inside tiles and blocks, one of a single token, padding; the second row is one document.
SEGMENTS = np.array([[1] * 40 + [2] + [3] * 90 + [0] * 18, [1] * LENGTH], np.int32)


def arrays(seed: int, batch: int, length: int, heads: int, kv_heads: int, d: int, dtype=np.float64):
    random = np.random.default_rng(seed)
    return [random.standard_normal((batch, length, n, d)).astype(dtype) for n in (heads, kv_heads, kv_heads, heads)]


def output_and_gradients(function, q, k, v, d_out):
    """The output, and the gradients of its product with `d_out`."""
    def product(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * d_out), out

    gradients, out = jax.jit(jax.grad(product, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


def assert_dense(plan: Plan, inputs, chip: Chip = CHIP, tolerance: float = 1e-10, interpret=True):
    kernel = functools.partial(attend_tpu, plan=plan, chip=chip, interpret=interpret)
    dense = functools.partial(attend_reference, plan=plan)
    for ours, exact in zip(output_and_gradients(kernel, *inputs), output_and_gradients(dense, *inputs)):
        assert ours.dtype == exact.dtype
        np.testing.assert_allclose(ours, exact, atol=tolerance)


def plan_of(name: str, segments) -> tuple[Plan, int]:
    """The plan of a rule over LENGTH tokens of text, and the length of its stream."""
    streams = 2 if isinstance(RULES[name], BlockDiffusion) else 1
    if segments is not None:
        segments = jnp.tile(jnp.asarray(segments), (1, streams))
    return make_plan(RULES[name], streams * LENGTH, segments), streams * LENGTH


@pytest.mark.parametrize("ratio, d", [(1, 64), (4, 128), (8, 96), *(pytest.param(*each, marks=pytest.mark.slow)
                                      for each in [(2, 96), (8, 256), (1, 128), (4, 64), (2, 256)])])
@pytest.mark.parametrize("name", RULES)
def test_forward_and_all_gradients_are_dense_attention_in_packed_documents(name, ratio, d):
    with jax.enable_x64(True):
        plan, length = plan_of(name, SEGMENTS)
        assert_dense(plan, arrays(0, 2, length, ratio, 1, d))


@pytest.mark.parametrize("ratio, d", [(2, 128), *(pytest.param(*each, marks=pytest.mark.slow)
                                      for each in [(1, 64), (4, 96), (8, 64)])])
@pytest.mark.parametrize("name", RULES)
def test_forward_and_all_gradients_are_dense_attention_without_documents(name, ratio, d):
    with jax.enable_x64(True):
        plan, length = plan_of(name, None)
        assert_dense(plan, arrays(1, 2, length, 2 * ratio, 2, d))


@pytest.mark.slow
@pytest.mark.parametrize("vmem", [4 << 20, 128 << 20])
@pytest.mark.parametrize("rule, length", [(BlockDiffusion(1100, 16), 2200), (Bidirectional(), 1300), (Causal(), 2100)])
def test_kv_ranges_of_all_widths_and_keys_in_pieces_are_dense_attention(rule, length, vmem):
    with jax.enable_x64(True):
        assert_dense(make_plan(rule, length), arrays(2, 1, length, 2, 1, 64), Chip(vmem, 256))


def test_queries_that_are_only_some_of_the_tokens_are_dense_attention():
    with jax.enable_x64(True):
        inputs = arrays(3, 1, 300, 2, 2, 64)
        q, k, v, d_out = inputs[0][:, 100:230], inputs[1], inputs[2], inputs[3][:, 100:230]
        assert_dense(make_plan(BlockCausal(16), 300, None, 130, 100), (q, k, v, d_out))


@pytest.mark.parametrize("dtype, tolerance", [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_lower_precision_stays_near_the_exact_result_in_its_own_dtype(dtype, tolerance):
    # bf16 has 8 bits: products of 300 standard normal values differ by some hundredths.
    plan, length = plan_of("block_diffusion", SEGMENTS)
    with jax.enable_x64(True):
        inputs = [x.astype(dtype) for x in arrays(4, 2, length, 4, 2, 128, np.float32)]
        exact = output_and_gradients(functools.partial(attend_reference, plan=plan),
                                     *(x.astype(np.float64) for x in inputs))
        ours = output_and_gradients(functools.partial(attend_tpu, plan=plan, chip=CHIP, interpret=True), *inputs)
        for x, y in zip(ours, exact):
            assert x.dtype == dtype
            np.testing.assert_allclose(np.asarray(x, np.float64), y, atol=tolerance)


def test_more_query_heads_than_a_tile_of_rows_holds_are_refused():
    inputs = arrays(9, 1, 130, 40, 1, 8, np.float32)[:3]
    with pytest.raises(UserError, match="40 query heads .* 'reference'"):
        attend_tpu(*inputs, make_plan(Causal(), 130), CHIP, True)


@pytest.mark.parametrize("name", ["block_diffusion", "annealed"])
def test_no_read_races_a_write_and_nothing_is_read_before_it_is_written(name):
    races = pytest.importorskip("jax._src.pallas.mosaic.interpret.interpret_pallas_call")
    plan, length = plan_of(name, SEGMENTS)
    careful = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan", out_of_bounds_reads="raise")
    assert_dense(plan, arrays(5, 2, length, 2, 1, 64, np.float32), tolerance=1e-4, interpret=careful)
    assert races.races.races_found is False


def test_a_row_that_sees_nothing_gives_zero_and_no_gradient_whatever_its_values():
    segments = jnp.asarray([[1] * 100 + [0] * 60])
    q, k, v, d_out = arrays(6, 1, 160, 2, 1, 64, np.float32)
    for x in (q, k, v):
        x[:, 100:] = 1e4
    plan = make_plan(Causal(), 160, segments)
    out, *gradients = output_and_gradients(
        functools.partial(attend_tpu, plan=plan, chip=CHIP, interpret=True), q, k, v, d_out)
    for array in (out, *gradients):
        assert np.isfinite(array).all() and np.abs(array[:, :100]).max() > 0
        np.testing.assert_array_equal(array[:, 100:], 0)


def test_no_gradient_reaches_the_clean_copy_of_a_noisy_block_or_its_future():
    length, block = 160, 20
    plan = make_plan(BlockDiffusion(length, block), 2 * length)
    q, k, v, _ = arrays(7, 1, 2 * length, 2, 1, 16, np.float32)
    _, back = jax.vjp(functools.partial(attend_tpu, q, plan=plan, chip=CHIP, interpret=True), k, v)
    back = jax.jit(back)
    for number in (0, 3, 7):
        chosen = np.zeros_like(q)
        chosen[:, number * block:(number + 1) * block] = 1
        seen = np.concatenate([np.arange(length) // block == number, np.arange(length) // block < number])
        for gradient in back(chosen):
            received = np.abs(gradient).sum((0, 2, 3))
            np.testing.assert_array_equal(received[~seen], 0)
        assert (received[seen] > 0).all()


@pytest.mark.parametrize("name", ["causal", "bidirectional", "block_causal", "block_diffusion", "token_causal"])
def test_a_packed_document_is_attended_as_if_alone(name):
    ends, streams = (0, 40, 41, 131), 2 if isinstance(RULES[name], BlockDiffusion) else 1
    q, k, v = (x.reshape(1, streams, 149, -1, 16) for x in arrays(8, 1, streams * 149, 4, 2, 16, np.float32)[:3])

    def out(lo: int, hi: int, segments) -> jax.Array:
        rule = RULES[name]
        if streams == 2:
            rule = BlockDiffusion(hi - lo, rule.block, rule.clean_half)
        parts = [x[:, :, lo:hi].reshape(1, streams * (hi - lo), -1, 16) for x in (q, k, v)]
        plan = make_plan(rule, streams * (hi - lo), segments)
        attend = jax.jit(functools.partial(attend_tpu, plan=plan, chip=CHIP, interpret=True))
        return attend(*parts).reshape(streams, hi - lo, 4, 16)

    packed = out(0, 149, jnp.tile(jnp.asarray(SEGMENTS[:1]), (1, streams)))
    alone = [out(lo, hi, None) for lo, hi in itertools.pairwise(ends)]
    np.testing.assert_allclose(packed[:, :131], np.concatenate(alone, 1), atol=1e-6)
