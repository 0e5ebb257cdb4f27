"""Planning without devices: formulas against counting, the parsing of compiled programs, and the real TPU and GPU
compilers."""

import dataclasses
import importlib.util
import json

import jax
import jax.numpy as jnp
import pytest

from dlm_jax.aot.hlo import collective_bytes
from dlm_jax.aot.report import aot, shape_of
from dlm_jax.commands.main import main, readable
from dlm_jax.config import load_config
from dlm_jax.diffusion.recipes import recipe
from dlm_jax.errors import UserError
from dlm_jax.models.shapes import SHAPES
from dlm_jax.models.weights import parameter_count
from dlm_jax.training.flops import step_flops

pytestmark = pytest.mark.usefixtures("optimized")
needs_compiler = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                    reason="libtpu, the TPU compiler, is not installed: pip install 'dlm-jax[tpu]'")
needs_gpu_compiler = pytest.mark.skipif(importlib.util.find_spec("jax_plugins") is None, reason=(
    "the CUDA build of jax is not installed: pip install 'dlm-jax[gpu]'"))

LOOP = """\
HloModule step

%inside (p: (f32[8])) -> (f32[8]) {
  %gather = bf16[4,128]{1,0} all-gather(%x), replica_groups=[2,4]<=[8], dimensions={0}
  %scatter = f32[16]{0} reduce-scatter(%y), replica_groups=[2,4]<=[8], to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %started = (f32[32]{0}, f32[128]{0}) all-gather-start(%a), replica_groups={{0,1,2,3}}
  %done = f32[128]{0} all-gather-done(%started)
  %loop = (f32[8]) while(%t), condition=%less, body=%inside, backend_config={"known_trip_count":{"n":"10"}}
}
"""


def test_collectives_are_counted_as_often_as_their_loops_run():
    assert collective_bytes(LOOP) == {"all-gather": 128 * 4 + 10 * 4 * 128 * 2, "reduce-scatter": 10 * 16 * 4 * 4}


STARTED_AND_DONE = """\
HloModule step

%less (p: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(9)
  %counter = s32[] get-tuple-element(%p), index=0
  ROOT %compare = pred[] compare(%counter, %limit), direction=LT
}

%fused (p: f32[8]) -> f32[8] {
  ROOT %inner = f32[32] all-reduce(%p), channel_id=5, to_apply=%add
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %two = s32[] constant(2)
  %counter.1 = s32[] get-tuple-element(%p), index=0
  %next = s32[] add(%counter.1, %two)
  %first = f32[32] all-reduce(%x), channel_id=5, to_apply=%add
  %fusion = f32[8] fusion(%first), kind=kCustom, calls=%fused
  %sent = (f32[4], f32[4], u32[], u32[]) collective-permute-start(%fusion), channel_id=6
  ROOT %out = (s32[], f32[8]) tuple(%next, %fusion)
}

ENTRY %main (a: f32[8]) -> f32[8] {
  ROOT %loop = (s32[], f32[8]) while(%t), condition=%less, body=%body
}
"""


def test_trip_counts_are_worked_out_where_not_stated_and_a_channel_counts_once():
    assert collective_bytes(STARTED_AND_DONE) == {"all-reduce": 5 * 32 * 4, "collective-permute": 5 * 4 * 4}


def test_a_program_of_one_device_sends_nothing():
    assert collective_bytes(jax.jit(lambda x: x @ x).lower(jnp.ones((4, 4))).compile().as_text()) == {}


@pytest.mark.parametrize("name, millions", [
    ("gpt2", 124), ("gpt2-medium", 355), ("meta-llama/Llama-2-7b-hf", 6738), ("Qwen/Qwen2.5-0.5B", 494),
    ("Qwen/Qwen2.5-1.5B", 1544), ("Qwen/Qwen3-4B-Base", 4022), ("Qwen/Qwen3-8B-Base", 8191)])
def test_known_bases_have_the_published_number_of_parameters(name, millions):
    assert round(parameter_count(SHAPES[name]) / 1e6) == millions


def test_flops_are_six_per_weight_and_token_plus_the_visible_pairs():
    model = SHAPES["meta-llama/Llama-2-7b-hf"]
    matrices = parameter_count(model) - (2 * model.depth + 1) * model.width - model.vocab_size * model.width
    pairs = 12 * model.depth * model.heads * model.head_dim
    one = 6 * 2048 * matrices + pairs * 2048**2
    assert step_flops(model, recipe("mdlm"), 3, 2048) == pytest.approx(3 * one, rel=1e-9)
    assert step_flops(model, recipe("ar"), 1, 2048) == pytest.approx(one - pairs * 2048 * 2047 / 2, rel=1e-9)
    head = model.vocab_size * model.width
    two = 6 * 2048 * (2 * matrices - head) + pairs * (2048**2 + 16 * 2048)
    assert step_flops(model, recipe("bd3lm"), 1, 2048) == pytest.approx(two, rel=1e-9)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology, mesh", [("v5p:2x2x1", ["mesh.tensor=2"]), ("v4:2x2x1", []), ("v5e:2x2", [])])
def test_the_step_compiles_for_a_topology_and_reports_its_memory(topology, mesh, tiny_config, tiny_run):
    run = [*tiny_run, "train.global_batch_size=8", "train.grad_accum_steps=1", *mesh]
    report = aot(load_config(tiny_config, run), topology)
    assert report.fits and 0 < report.arguments_gib + report.temporaries_gib <= report.peak_gib < report.capacity_gib
    assert report.devices == report.chips == 4
    assert set(report.seconds) == {"compute", "memory", "interconnect"} and report.bottleneck in report.seconds
    assert {"all-gather", "all-reduce"} <= report.collective_gib.keys()


@needs_gpu_compiler
@pytest.mark.parametrize("topology, count", [("h100:4", 4), ("h200:1", 1), ("h200:16", 16)])
def test_the_step_compiles_for_the_gpus_of_one_host_or_several(topology, count, tiny_config, tiny_run):
    run = [*tiny_run, "train.global_batch_size=16", "train.grad_accum_steps=1", f"mesh.replica={max(1, count // 8)}"]
    report = aot(load_config(tiny_config, run), topology)
    assert report.fits and 0 < report.arguments_gib + report.temporaries_gib <= report.peak_gib < report.capacity_gib
    assert report.devices == report.chips == count
    assert bool(report.collective_gib) == (count > 1)
    assert report.seconds_step > report.spent["products"] > 0 and 0 < report.mfu < 1
    assert 0 < report.copies_share < 1 and 0 <= report.hidden_share <= 1


# GiB of one of four chips, by jax 0.10.2 with its libtpu: two layers of DiffuGPT-M in fp32 with their moments, and what
# a record of 512 tokens takes in bf16. `make pods` has the full models.
PEAKS_OF_TWO_LAYERS = {"v4:2x2x1": 0.640, "v5e:2x2": 0.548, "v5p:2x2x1": 0.599, "v6e:2x2": 0.706}


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", PEAKS_OF_TWO_LAYERS)
def test_two_layers_of_a_shipped_model_take_the_memory_that_they_took(topology, tiny_config, tiny_run, monkeypatch):
    two = dataclasses.replace(SHAPES["gpt2-medium"], depth=2)
    monkeypatch.setitem(SHAPES, "two layers", two)
    run = [*tiny_run, "model.base=two layers", "model.dtype=bfloat16", "model.remat=full", "data.seq_length=512",
           "train.global_batch_size=4", "train.grad_accum_steps=1"]
    report = aot(load_config(tiny_config, run), topology)
    state = 3 * 4 * parameter_count(dataclasses.replace(two, vocab_size=50258)) / 4 / 2**30
    assert report.fits and report.arguments_gib == pytest.approx(state, rel=0.02)
    assert report.peak_gib == pytest.approx(PEAKS_OF_TWO_LAYERS[topology], rel=0.1)


@needs_compiler
@pytest.mark.slow
def test_the_command_ends_stdout_with_one_json_object(tiny_config, tiny_run, capsys):
    overrides = [f"--config.{x}" for x in (*tiny_run, "train.global_batch_size=8", "train.grad_accum_steps=1")]
    assert main(["aot", "--config", str(tiny_config), "--topology", "v6e:2x2", "--json", *overrides]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["fits"] is True and report["topology"] == "v6e:2x2"
    assert {"peak_gib", "capacity_gib", "chips"} <= report.keys()


def test_a_report_prints_short_numbers_and_one_line_per_group():
    assert readable({"interconnect": 6.25e-05, "memory": 0.04}) == "interconnect 6.25e-05, memory 0.0400"
    assert [readable(x) for x in (True, 8, "v5e:2x2", 1.5, 3.1755e15, 0.0)] == [
        "True", "8", "v5e:2x2", "1.5000", "3.18e+15", "0"]


@needs_compiler
@pytest.mark.parametrize("topology, changes, sentence", [
    ("v9:2x2", [], "'v9:2x2' is no slice of TPUs"), ("v5p:3x3x3x3", [], "does not know the topology"),
    ("v5e:2x2", ["mesh.fsdp=3"], "does not make up the 4 devices"),
    ("v5e:2x2", ["mesh.context=4", "mesh.fsdp=1", "data.seq_length=62"], "62 cannot be split evenly over mesh.context"),
    ("v5e:2x2", ["train.global_batch_size=6", "train.grad_accum_steps=1"], "cannot be split evenly")])
def test_what_cannot_be_compiled_is_refused(topology, changes, sentence, tiny_config, tiny_run):
    with pytest.raises(UserError, match=sentence):
        aot(load_config(tiny_config, [*tiny_run, *changes]), topology)


@pytest.mark.parametrize("topology, slices", [("h200:0", 1), ("h200:12", 1), ("h200:2x8", 1), ("h200", 1),
                                              ("h100:8", 2)])
def test_hosts_of_gpus_that_are_not_full_and_malformed_counts_are_refused(topology, slices, tiny_config, tiny_run):
    with pytest.raises(UserError, match=rf"^'{topology}'( in 2 slices)? is not a topology of GPUs; give up to 8 of"):
        aot(load_config(tiny_config, tiny_run), topology, slices)


@pytest.mark.parametrize("topology, needed", [("v5e:2x2", r"libtpu: pip install 'dlm-jax\[tpu\]'"),
                                              ("h200:8", r"the CUDA build of jax: pip install 'dlm-jax\[gpu\]'")])
def test_without_the_compiler_the_error_names_what_to_install(topology, needed, monkeypatch, tiny_config, tiny_run):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=f"needs {needed}"):
        aot(load_config(tiny_config, tiny_run), topology)


def test_a_known_base_needs_no_files_and_grows_by_its_mask_row(tiny_config, tiny_run):
    llama, qwen = (load_config(tiny_config, [*tiny_run, f"model.base={base}", "model.mask=new"])
                   for base in ("meta-llama/Llama-2-7b-hf", "Qwen/Qwen3-8B-Base"))
    assert shape_of(llama).vocab_size == 32001 and shape_of(qwen).vocab_size == 151936
