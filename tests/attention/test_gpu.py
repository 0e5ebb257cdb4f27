"""The Hopper kernels equal the reference, have no races in the interpreter, and lower for CUDA."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax._src.pallas.mosaic_gpu.interpret", reason="this jax has no interpreter of Mosaic GPU kernels")
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races, reset_gpu_interpret_mode_state
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from dlm_jax.attention import gpu
from dlm_jax.attention.gpu import attend_gpu
from dlm_jax.attention.gpu_parts import decode_visit
from dlm_jax.attention.plan import Plan, make_plan
from dlm_jax.attention.reference import attend_reference
from dlm_jax.attention.rules import Annealed, Bidirectional, BlockCausal, BlockDiffusion, Causal
from dlm_jax.errors import UserError

INTERPRET = InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
ANNEALED = Annealed(jnp.float32(0.3), jnp.uint32(5))


@pytest.fixture(autouse=True)
def checked_for_races(monkeypatch):
    """Checks every kernel that runs for races, right away: the interpreter keeps only those of the last kernel."""
    def watch(kernel):
        def run(*arguments):
            out = jax.block_until_ready(kernel(*arguments))
            if not isinstance(jax.tree.leaves(out)[0], jax.core.Tracer):
                assert not get_races().races_found
            return out
        return run

    for name in ("launch_forward", "launch_d_queries", "launch_d_keys"):
        monkeypatch.setattr(gpu, name, watch(getattr(gpu, name)))
    yield
    reset_gpu_interpret_mode_state()


@pytest.fixture(autouse=True)
def compiled_once(monkeypatch):
    """The interpreter recompiles the program of a kernel for each thread of each block; here, only for the first."""
    programs, lock = {}, threading.Lock()

    def run(jaxpr, consts, *arguments):
        with lock:
            if jaxpr not in programs:
                program = jax.jit(lambda consts, *arguments: jax.core.eval_jaxpr(jaxpr, consts, *arguments))
                programs[jaxpr] = program.lower(consts, *arguments).compile()
        programs[jaxpr](consts, *arguments)

    monkeypatch.setattr(thread_map, "_run_jaxpr", run)


def draw(length: int, heads: int, kv_heads: int, d: int, dtype, batch: int = 1) -> list[jax.Array]:
    """q, k, v and the gradient of the output."""
    random = np.random.default_rng(0)
    return [jnp.asarray(random.standard_normal((batch, length, h, d)), dtype)
            for h in (heads, kv_heads, kv_heads, heads)]


def output_and_gradients(attend, q, k, v, d_o):
    out, pull = jax.vjp(attend, q, k, v)
    return [np.asarray(x, np.float64) for x in (out, *pull(d_o))]


def interpreted(plan: Plan, *arrays: jax.Array) -> list[np.ndarray]:
    return output_and_gradients(lambda q, k, v: attend_gpu(q, k, v, plan, INTERPRET), *arrays)


def documents(*lengths: int, padding: int = 0, streams: int = 1) -> jax.Array:
    """Segments of one packed sequence, the padding last."""
    numbers = np.repeat(np.arange(len(lengths) + 1), [*lengths, padding])
    return jnp.asarray(np.tile(np.where(numbers == len(lengths), 0, numbers + 1), streams))[None]


TWO = jnp.concatenate([documents(37, 90, padding=23), documents(140, padding=10)])  # different documents
CASES = {
    "causal, grouped heads": (Causal(), 200, None, 2, 1, 64, jnp.bfloat16),
    "bidirectional, every slot reused": (Bidirectional(), 385, None, 1, 1, 64, jnp.float16),
    "block causal, packed, heads of 96": (BlockCausal(16), 150, TWO, 1, 1, 96, jnp.bfloat16),
    "two streams": (BlockDiffusion(100, 32), 200, None, 2, 1, 128, jnp.bfloat16),
    "two streams over an AR half, packed": (
        BlockDiffusion(150, 16, "token_causal"), 300, documents(45, 85, padding=20, streams=2), 1, 1, 64, jnp.float16),
    "annealed, packed": (ANNEALED, 140, documents(100, 30, padding=10), 1, 1, 64, jnp.bfloat16),
}



@pytest.mark.parametrize("case", [
    case if case == "two streams" else pytest.param(case, marks=pytest.mark.slow) for case in CASES])
def test_output_and_gradients_are_those_of_the_reference_without_races(case):
    rule, length, segments, heads, kv_heads, d, dtype = CASES[case]
    arrays = draw(length, heads, kv_heads, d, dtype, batch=1 if segments is None else len(segments))
    plan = make_plan(rule, length, segments)
    ours = interpreted(plan, *arrays)
    with jax.enable_x64(True):
        exact = (jnp.asarray(np.asarray(x, np.float64)) for x in arrays)
        reference = output_and_gradients(lambda q, k, v: attend_reference(q, k, v, plan), *exact)
    # P and dS are rounded once before they are multiplied and each result once after, by half an `eps` at most; the
    # o in rowsum(o d_o) once more. The sums themselves are fp32. So two `eps` of the largest value bound an error.
    for mine, theirs in zip(ours, reference):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2 * float(jnp.finfo(dtype).eps) * np.abs(theirs).max())


def test_padding_rows_and_keys_are_exactly_zero_even_where_an_entire_tile_is_padding():
    arrays = draw(135, 1, 1, 64, jnp.bfloat16)
    for array in interpreted(make_plan(Bidirectional(), 135, documents(120, padding=15)), *arrays):
        np.testing.assert_array_equal(array[:, 120:], 0)
        assert np.isfinite(array).all() and (np.abs(array[:, :120]).max((0, 2, 3)) > 0).all()


def test_no_gradient_reaches_the_clean_copy_of_a_noisy_block_or_its_future():
    length, block, chosen = 80, 16, 2
    q, k, v, d_o = draw(2 * length, 1, 1, 64, jnp.bfloat16)
    number = np.arange(2 * length) % length // block
    noisy = np.arange(2 * length) < length
    d_o = jnp.where((noisy & (number == chosen))[None, :, None, None], d_o, 0)
    _, _, d_k, d_v = interpreted(make_plan(BlockDiffusion(length, block), 2 * length), q, k, v, d_o)
    seen = np.where(noisy, number == chosen, number < chosen)
    for gradient in (d_k, d_v):
        np.testing.assert_array_equal(np.abs(gradient).sum((0, 2, 3)) > 0, seen)


@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("rule", [Causal(), BlockDiffusion(128, 32), ANNEALED], ids=lambda rule: type(rule).__name__)
def test_both_passes_lower_for_cuda(rule, d):
    def passes(q, k, v, d_o):
        out, pull = jax.vjp(lambda *a: attend_gpu(*a, make_plan(rule, 256)), q, k, v)
        return out, pull(d_o)

    lowered = jax.jit(passes).trace(*draw(256, 4, 2, d, jnp.bfloat16)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("custom_call @mosaic_gpu") == 3


def test_a_list_names_each_visible_tile_once_and_the_longest_list_is_first():
    rule, length = BlockDiffusion(320, 32), 640
    plan = make_plan(rule, length)
    mask = np.asarray(plan.visible(np.arange(length)))[0].reshape(5, 128, 5, 128)
    visits = gpu.visit_lists(plan, length)
    for lists, holds in ((visits.queries, mask.any((1, 3))), (visits.keys, mask.any((1, 3)).T)):
        assert list(lists[0, :, 1]) == sorted(lists[0, :, 1], reverse=True)
        for tile, count, *codes in lists[0]:
            others = [code // 4 for code in codes[:count]]
            assert set(others) == set(np.flatnonzero(holds[tile]))
            assert len(set(codes[:count])) == count


def test_the_example_in_the_docstring_of_pack_visits_holds():
    visits = gpu.visit_lists(make_plan(Causal(), 256), 256)
    np.testing.assert_array_equal(visits.queries, [[[1, 2, 0, 3], [0, 1, 1, 3]]])
    assert "[[1, 2, 0, 3], [0, 1, 1, 3]]" in gpu.pack_visits.__doc__
    decoded = [tuple(map(int, decode_visit(jnp.int32(code), 1))) for code in (0, 3, 1)]  # (keys, region, partial)
    assert decoded == [(0, 0, 0), (1, 0, 1), (0, 0, 1)]


@pytest.mark.parametrize("regions", [1, 2])
def test_a_decoded_visit_is_the_tile_and_region_that_were_packed(regions):
    visited = np.random.default_rng(regions).random((2, 5, 4, regions)) < 0.5
    partial = np.random.default_rng(9).random(visited.shape) < 0.5
    for lists, seen, hides in zip(gpu.pack_visits(visited, partial), visited, partial):
        for tile, count, *codes in lists:
            found = [tuple(map(int, decode_visit(jnp.int32(code), regions))) for code in codes[:count]]
            assert found == [(*place, hides[tile][tuple(place)]) for place in np.argwhere(seen[tile])]


def test_what_the_tensor_cores_cannot_multiply_is_refused():
    plan = make_plan(Causal(), 8)
    with pytest.raises(UserError, match="not float32, float32 and float32; use the implementation `reference`"):
        attend_gpu(*draw(8, 1, 1, 64, jnp.float32)[:3], plan)
    with pytest.raises(UserError, match="up to 128 dimensions, not 256"):
        attend_gpu(*draw(8, 1, 1, 256, jnp.bfloat16)[:3], plan)
