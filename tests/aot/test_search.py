"""The search finds the fastest settings that fit, and tries only those that a run would take."""

import math
from types import SimpleNamespace

import pytest

from dlm_jax.aot import search as module
from dlm_jax.aot.report import mesh_text
from dlm_jax.config import load_config
from dlm_jax.models.shapes import SHAPES

SAVED = {"none": 8, "save_projections": 4, "save_qkv": 3, "save_attention": 2, "full": 1}  # of what a micro-batch keeps


def planned(config, seconds, compiled: list):
    """A report by a formula in place of the compiler's: a chip has room for one row of which everything is kept."""
    replica, fsdp, context, tensor = sizes = module.sizes_of(config, "v5e:4x4", 1)
    rows = config.train.global_batch_size / config.train.grad_accum_steps / (replica * fsdp * context * tensor)
    peak = SAVED[config.model.remat] * rows
    compiled.append((config.model.remat, sizes, config.train.grad_accum_steps))
    return SimpleNamespace(remat=config.model.remat, mesh=mesh_text(config, 16), fits=peak <= 8, peak_gib=peak,
                           capacity_gib=8, grad_accum_steps=config.train.grad_accum_steps, seconds={},
                           seconds_step=seconds(config, *sizes))


@pytest.fixture
def searched(monkeypatch):
    """A function that searches for Qwen3-8B on 16 chips, with these seconds per step; also what was compiled."""
    def run(seconds, hosts: int = 1, *overrides: str):
        compiled: list = []
        monkeypatch.setattr(module, "devices", lambda *_: [SimpleNamespace(slice_index=i % hosts) for i in range(16)])
        monkeypatch.setattr(module, "aot", lambda config, *_: planned(config, seconds, compiled))
        config = load_config("efficient_dlm_8b", ["train.global_batch_size=64", *overrides])
        return module.search(config, "v5e:4x4"), compiled
    return run


def test_the_fastest_that_fits_is_found_over_remat_accumulation_and_mesh(searched):
    def seconds(config, replica, fsdp, context, tensor):  # best: nothing recomputed, four shards of heads
        recomputed = SAVED["none"] / SAVED[config.model.remat]
        return recomputed + abs(math.log2(tensor) - 2) + 0.1 * config.train.grad_accum_steps

    reports, compiled = searched(seconds)
    best = reports[0]
    assert (best.remat, best.mesh, best.grad_accum_steps) == ("none", "fsdp=4 tensor=4", 4) and best.fits
    assert [report.fits for report in reports] == sorted((report.fits for report in reports), reverse=True)
    assert len(compiled) == len(set(compiled))
    # Other meshes are tried with the best policy only.
    assert {remat for remat, sizes, _ in compiled if sizes != (1, 16, 1, 1)} == {"none"}


def test_only_meshes_are_tried_that_divide_heads_batch_and_hosts(searched):
    _, compiled = searched(lambda config, replica, fsdp, context, tensor: 1 / tensor, 2, "mesh.replica=2")
    meshes = {sizes for _, sizes, _ in compiled}
    assert max(tensor for *_, tensor in meshes) == 8 and all(replica % 2 == 0 for replica, *_ in meshes)
    assert all(math.prod(sizes) == 16 for sizes in meshes)


def test_a_policy_that_never_fits_is_reported_last_with_its_smallest_micro_batch(searched, monkeypatch):
    monkeypatch.setitem(SAVED, "none", 9)
    reports, _ = searched(lambda *_: 1.0)
    worst = next(report for report in reports if report.remat == "none")
    assert not worst.fits and worst.grad_accum_steps == 4 and worst is reports[-1]


def test_no_mesh_is_tried_on_a_single_device(monkeypatch, tiny_config, tiny_run):
    monkeypatch.setattr(module, "devices", lambda *_: [SimpleNamespace()])
    monkeypatch.setitem(SHAPES, "one", SHAPES["gpt2"])
    config = load_config(tiny_config, [*tiny_run, "model.base=one"])
    assert list(module.neighbours(config, "v5e:1x1", 1)) == []


@pytest.mark.slow
def test_a_real_search_ends_with_a_report_of_the_compiler(tiny_config, tiny_run):
    pytest.importorskip("libtpu")
    config = load_config(tiny_config, [*tiny_run, "train.global_batch_size=4", "train.grad_accum_steps=1"])
    best, *others = module.search(config, "v5e:2x2")
    assert best.fits and all(best.seconds_step <= other.seconds_step for other in others)
    assert len({report.mesh for report in (best, *others)}) > 1
