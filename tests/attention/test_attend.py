"""Attention: the implementations agree, documents are kept apart, and nothing hidden leaks."""

import functools
import itertools
import logging
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import dlm_jax.attention
from dlm_jax.attention.cpu import attend_cpu
from dlm_jax.attention.dispatch import attend, choose_implementation, log_choice
from dlm_jax.attention.plan import Plan, make_plan
from dlm_jax.attention.reference import attend_reference
from dlm_jax.attention.rules import Annealed, Bidirectional, BlockCausal, BlockDiffusion, Causal, LookAhead
from dlm_jax.attention.splash import attend_splash
from dlm_jax.attention.tiles import tile_ranges
from dlm_jax.errors import UserError

IMPLEMENTATIONS = {"reference": attend_reference, "cpu": attend_cpu}


def draw(seed: int, *shapes: tuple[int, ...], dtype=np.float32) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.standard_normal(shape).astype(dtype) for shape in shapes]


def qkv(seed: int, batch: int, queries: int, keys: int, heads: int, kv_heads: int, dtype=np.float32):
    kv = (batch, keys, kv_heads, 4)
    return draw(seed, (batch, queries, heads, 4), kv, kv, dtype=dtype)


def random_plan(seed: int, batch: int, queries: int, keys: int) -> Plan:
    """Random intervals in the two halves of the keys; the first query of the first sequence sees nothing."""
    random = np.random.default_rng(seed)
    ends = np.sort(random.integers(0, keys // 2 + 1, (2, batch, 2, queries)), 0) + [[0], [keys // 2]]
    ends[:, 0, :, 0] = 0
    lo, hi = np.where(ends[1] > ends[0], ends, 0).astype(np.int32)
    return Plan(lo, hi, tile_ranges(lo, hi, None, keys), None, None, False)


def by_hand(q: np.ndarray, k: np.ndarray, v: np.ndarray, plan: Plan) -> np.ndarray:
    """softmax(q k / sqrt(d)) v, one query at a time."""
    mask = np.asarray(plan.visible(np.arange(k.shape[1])))
    out = np.zeros_like(q)
    for b, n, h in np.ndindex(q.shape[:3]):
        seen = mask[b % len(mask), n]
        g = h // (q.shape[2] // k.shape[2])
        if seen.any():
            weights = np.exp(k[b, seen, g] @ q[b, n, h] / np.sqrt(q.shape[3]))
            out[b, n, h] = weights / weights.sum() @ v[b, seen, g]
    return out


def value_and_gradients(implementation, q, k, v, plan, d_out):
    """The output, and the gradients of its product with `d_out`."""
    def product(q, k, v):
        out = implementation(q, k, v, plan)
        return jnp.sum(out * d_out), out

    gradients, out = jax.jit(jax.grad(product, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize("ratio, queries, keys, batch, mask_batch", [
    (1, 5, 5, 2, 2), (2, 7, 7, 3, 1), (4, 9, 9, 2, 2), (8, 3, 11, 2, 1), (8, 1, 6, 1, 1), (2, 1, 7, 3, 1)])
def test_every_implementation_is_the_definition_in_float64_with_all_gradients(ratio, queries, keys, batch, mask_batch):
    with jax.enable_x64(True):
        arrays = qkv(0, batch, queries, keys, 8, 8 // ratio, np.float64)
        plan = random_plan(1, mask_batch, queries, keys)
        (d_out,) = draw(2, arrays[0].shape, dtype=np.float64)
        reference = value_and_gradients(attend_reference, *arrays, plan, d_out)
        cpu = value_and_gradients(attend_cpu, *arrays, plan, d_out)
        np.testing.assert_allclose(reference[0], by_hand(*arrays, plan), atol=1e-12)
        for ours, theirs in zip(cpu, reference):
            assert ours.dtype == jnp.float64
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradients_are_finite_differences(name):
    with jax.enable_x64(True):
        arrays = qkv(3, 2, 3, 3, 4, 2, np.float64)
        plan = random_plan(4, 2, 3, 3)
        check_grads(jax.jit(lambda *a: IMPLEMENTATIONS[name](*a, plan)), arrays, order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_a_row_that_sees_nothing_gives_zero_and_no_gradient(name):
    arrays = qkv(5, 2, 4, 4, 2, 1)
    plan = make_plan(Bidirectional(), 4, jnp.array([[1] * 4, [0] * 4]))
    out, *gradients = value_and_gradients(IMPLEMENTATIONS[name], *arrays, plan, np.ones_like(arrays[0]))
    for array in (out, *gradients):
        assert np.isfinite(array).all() and np.abs(array[0]).max() > 0
        np.testing.assert_array_equal(array[1], 0)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_padding_gives_zero_whatever_its_values(name):
    q, k, v = qkv(6, 1, 5, 5, 2, 2)
    segments = jnp.array([[1, 1, 1, 0, 0]])
    for array in (q, k, v):
        array[:, 3:] = 1e4
    out = jax.jit(lambda *a: attend(*a, Bidirectional(), segments, name))(q, k, v)
    np.testing.assert_array_equal(out[:, 3:], 0)
    alone = by_hand(q[:, :3], k[:, :3], v[:, :3], make_plan(Bidirectional(), 3))
    np.testing.assert_allclose(out[:, :3], alone, atol=1e-5)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_half_precision_stays_near_the_exact_result_in_its_own_dtype(name):
    arrays = qkv(7, 1, 8, 8, 2, 2)
    plan = make_plan(Causal(), 8)
    out = jax.jit(IMPLEMENTATIONS[name])(*(jnp.asarray(a, jnp.bfloat16) for a in arrays), plan)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), by_hand(*arrays, plan), atol=0.05)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_huge_scores_do_not_overflow(name):
    q, k, v = (100 * a for a in qkv(8, 1, 4, 4, 1, 1))
    out = jax.jit(IMPLEMENTATIONS[name])(q, k, v, make_plan(Bidirectional(), 4))
    assert np.isfinite(out).all()


ONE_STREAM = {"causal": Causal(), "bidirectional": Bidirectional(), "block_causal": BlockCausal(3)}


@pytest.mark.parametrize("name", [*ONE_STREAM, "block_diffusion"])
def test_a_packed_document_is_masked_as_if_alone(name):
    ends, streams = (0, 4, 5, 10), 2 if name == "block_diffusion" else 1
    q, k, v = (a.reshape(1, streams, 10, 2, 4) for a in qkv(9, 1, streams * 10, streams * 10, 2, 2))

    def out(lo: int, hi: int, segments, implementation: str) -> jax.Array:
        rule = ONE_STREAM.get(name, BlockDiffusion(hi - lo, 3))
        arrays = (a[:, :, lo:hi].reshape(1, -1, 2, 4) for a in (q, k, v))
        return attend(*arrays, rule, segments, implementation).reshape(streams, hi - lo, 2, 4)

    @jax.jit
    def packed_and_alone(segments):
        packed = {i: out(0, 10, segments, i) for i in IMPLEMENTATIONS}
        return packed, [out(lo, hi, None, "reference") for lo, hi in itertools.pairwise(ends)]

    packed, alone = packed_and_alone(jnp.tile(jnp.array([1] * 4 + [2] * 1 + [3] * 5), streams)[None])
    for together in packed.values():
        np.testing.assert_allclose(together, np.concatenate(alone, 1), atol=1e-6)


def test_annealed_never_opens_an_edge_between_documents():
    q, k, v = qkv(10, 1, 6, 6, 1, 1)
    segments = jnp.array([[1, 1, 1, 2, 2, 2]])
    opened, full = (jax.jit(functools.partial(attend, rule=rule, segments=segments))(q, k, v)
                    for rule in (Annealed(jnp.float32(1), jnp.uint32(0)), Bidirectional()))
    np.testing.assert_allclose(opened, full, atol=1e-7)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_gradient_reaches_the_clean_copy_of_a_noisy_block_or_its_future(name):
    length, block = 8, 2
    arrays = qkv(11, 1, 2 * length, 2 * length, 2, 1)
    plan = make_plan(BlockDiffusion(length, block), 2 * length)

    @jax.jit
    @jax.vmap
    def key_and_value_gradients(chosen: jax.Array):
        """Gradients of the output of the chosen noisy tokens with respect to keys and values."""
        def total(k, v):
            out = attend(arrays[0], k, v, plan, implementation=name)
            return jnp.sum(out * chosen[None, :, None, None])

        return jax.grad(total, argnums=(0, 1))(*arrays[1:])

    blocks = length // block
    chosen = np.zeros((blocks, 2 * length), np.float32)
    for number in range(blocks):
        chosen[number, number * block:(number + 1) * block] = 1
    d_k, d_v = (np.abs(g).sum((1, 3, 4)) for g in key_and_value_gradients(chosen))  # [blocks, 2 length]
    for number in range(blocks):
        own = np.arange(length) // block == number
        clean_past = np.arange(length) // block < number
        seen = np.concatenate([own, clean_past])
        np.testing.assert_array_equal(d_k[number][~seen], 0)
        np.testing.assert_array_equal(d_v[number] > 0, seen)


def test_auto_picks_the_implementation_of_the_platform_and_logs_it_once(caplog):
    log_choice.cache_clear()
    arrays = qkv(12, 1, 5, 5, 2, 2)
    with caplog.at_level(logging.DEBUG, "dlm_jax"):
        for _ in range(2):
            auto = jax.jit(lambda *a: attend(*a, Causal()))(*arrays)
    assert [record.getMessage() for record in caplog.records] == ["attention: 'cpu' on this CPU"]
    np.testing.assert_allclose(auto, by_hand(*arrays, make_plan(Causal(), 5)), atol=1e-5)


def test_kernels_are_chosen_by_platform_shape_and_dtype(monkeypatch):
    monkeypatch.setattr("dlm_jax.attention.dispatch.is_hopper", lambda: True)
    half = [jnp.zeros((1, n, 2, d), jnp.bfloat16) for n, d in ((128, 64), (64, 64), (128, 256))]
    assert [choose_implementation("tpu", x) for x in half] == ["tpu", "reference", "tpu"]
    assert [choose_implementation("gpu", x) for x in half] == ["gpu", "reference", "reference"]
    assert choose_implementation("gpu", jnp.zeros((1, 128, 2, 64))) == "reference"
    monkeypatch.setattr("dlm_jax.attention.dispatch.is_hopper", lambda: False)
    assert choose_implementation("gpu", half[0]) == "reference"
    assert choose_implementation("cpu", half[1]) == "cpu"


def test_an_unknown_implementation_is_refused_and_the_known_ones_listed():
    with pytest.raises(UserError, match="'flash'.*auto, reference, cpu"):
        attend(*qkv(13, 1, 2, 2, 1, 1), Causal(), implementation="flash")


@pytest.mark.parametrize("name, platform", [("tpu", "TPU"), ("splash", "TPU"), ("gpu", "GPU")])
def test_a_kernel_is_refused_where_it_cannot_run(name, platform):
    with pytest.raises(UserError, match=f"'{name}' runs on a {platform} only, and this program is for a CPU"):
        attend(*qkv(14, 1, 2, 2, 1, 1), Causal(), implementation=name)


@pytest.mark.parametrize("rule, length", [(Causal(), 200), (BlockDiffusion(150, 32), 300)])
def test_splash_is_attention_with_all_gradients(rule, length):
    arrays = qkv(15, 2, length, length, 4, 2)
    (d_out,) = draw(16, arrays[0].shape)
    plan = make_plan(rule, length)
    splash = value_and_gradients(functools.partial(attend_splash, interpret=True), *arrays, plan, d_out)
    for ours, exact in zip(splash, value_and_gradients(attend_reference, *arrays, plan, d_out)):
        np.testing.assert_allclose(ours, exact, atol=1e-5)


@pytest.mark.parametrize("rule, segments", [(Causal(), jnp.ones((1, 8), int)), (LookAhead(jnp.int32(2)), None)])
def test_splash_refuses_a_mask_that_is_not_static(rule, segments):
    with pytest.raises(UserError, match="one static mask"):
        attend_splash(*qkv(17, 1, 8, 8, 1, 1), make_plan(rule, 8, segments))


@pytest.mark.parametrize("rule", [BlockDiffusion(200, 16), BlockCausal(30), Annealed(np.float32(0.3), np.uint32(1))])
@pytest.mark.parametrize("documents", [True, False])
def test_splitting_the_queries_into_runs_changes_nothing(rule, documents):
    segments = jnp.tile(jnp.sort(jax.random.randint(jax.random.key(0), (2, 200), 0, 5)), (1, 2))
    arrays = qkv(18, 2, 400, 400, 4, 2)
    (d_out,) = draw(19, arrays[0].shape)
    plan = make_plan(rule, 400, segments if documents else None)
    for ours, exact in zip(value_and_gradients(attend_cpu, *arrays, plan, d_out),
                           value_and_gradients(attend_reference, *arrays, plan, d_out)):
        np.testing.assert_allclose(ours, exact, atol=1e-5)


def test_the_package_exports_attend_and_the_rules():
    from dlm_jax.attention import BlockDiffusion, attend
    q, k, v = qkv(20, 1, 8, 8, 2, 1)
    out = jax.jit(lambda *a: attend(*a, BlockDiffusion(4, 2)))(q, k, v)
    np.testing.assert_allclose(out, by_hand(q, k, v, make_plan(BlockDiffusion(4, 2), 8)), atol=1e-5)


def test_the_package_has_every_name_that_it_lists_and_no_other():
    assert all(callable(getattr(dlm_jax.attention, name)) for name in dlm_jax.attention.__all__)
    with pytest.raises(AttributeError, match="attribute flash"):
        _ = dlm_jax.attention.flash


def test_importing_the_package_alone_does_not_import_jax():
    code = "import sys, dlm_jax.attention; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


MESH = """
import functools, jax, jax.numpy as jnp, numpy as np
from jax.sharding import PartitionSpec as P
from dlm_jax.attention import dispatch
from dlm_jax.attention.plan import make_plan, split_plan
from dlm_jax.attention.rules import BlockDiffusion
from dlm_jax.attention.tpu import Chip, attend_tpu
from dlm_jax.errors import UserError
from dlm_jax.parallel.context import deal, restore
from dlm_jax.parallel.mesh import BATCH_AXES, auto_sharded, make_mesh
from dlm_jax.segments import find_documents

random = np.random.default_rng(0)
q, k, v = (random.standard_normal((4, 128, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
segments = np.tile(np.sort(random.integers(0, 4, (4, 64))), (1, 2))
kernel = functools.partial(attend_tpu, chip=Chip(16 << 20, 128), interpret=True)
layout = P(BATCH_AXES, None, "tensor", None)

def gradients(q, k, v, segments):
    return jax.grad(lambda *a: jnp.sum(dispatch.attend(*a, BlockDiffusion(64, 8), segments) ** 2), (0, 1, 2))(q, k, v)

def split_gradients(q, k, v, segments):
    documents = find_documents(128, segments, 64)
    plan = split_plan(make_plan(BlockDiffusion(64, 8), 128, deal(segments), documents=jax.tree.map(deal, documents)))
    found = jax.grad(lambda *a: jnp.sum(dispatch.attend(*a, plan) ** 2), (0, 1, 2))(*map(deal, (q, k, v)))
    return [restore(x.reshape(*x.shape[:2], -1)).reshape(x.shape) for x in found]

alone = jax.jit(gradients)(q, k, v, segments)
for function in (dispatch.load_implementation("cpu"), kernel):
    dispatch.load_implementation = lambda name: function
    jax.clear_caches()
    for mesh, program in ((make_mesh(2, 2, 2), gradients), (make_mesh(1, 2, 1, context=4), split_gradients)):
        with jax.set_mesh(mesh):
            sharded = jax.jit(lambda *a: auto_sharded(program, layout)(*a))(q, k, v, segments)
        for x, y in zip(sharded, alone):
            assert x.sharding.spec == layout
            np.testing.assert_allclose(x, y, atol=1e-5)
with jax.set_mesh(make_mesh(2, 1, 4)):
    try:
        jax.jit(lambda *a: auto_sharded(gradients, P())(*a))(q, k, v, segments)
    except UserError as error:
        assert "mesh.tensor 4 does not divide the 2 key-value heads" in str(error)
    else:
        raise AssertionError("heads that the mesh does not divide were accepted")
"""


@pytest.mark.slow
def test_in_a_mesh_each_device_attends_for_its_own_slice_of_batch_and_heads_or_of_the_tokens():
    flags = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-c", MESH], capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr[-3000:]
