"""The schedule of a compiled program: loops counted with their trips, collectives by whether something waits."""

import pytest

from dlm_jax.aot.estimate import computed_pairs, kernel_run, kernel_seconds
from dlm_jax.aot.program import opcode, read_program, size_of
from dlm_jax.aot.schedule import Transfer, schedule_of
from dlm_jax.config import load_config
from dlm_jax.models.shapes import SHAPES
from dlm_jax.parallel.device_specs import device_spec

# As the TPU compiler writes it, shortened. A loop of five trips: a gather in line, a product of 1,000 cycles, a sum
# that is started before a copy of 30 and a fusion of 70 cycles and done after them; before the loop a kernel.
PROGRAM = """\
HloModule step, is_scheduled=true

%product (a: bf16[8,8], b: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %b = bf16[8,8]{1,0} parameter(1)
  ROOT %c = bf16[8,8]{1,0} convolution(%a, %b), dim_labels=bf_io->bf
}

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  ROOT %s = f32[] add(%x, %y)
}

%condition (p: (s32[], bf16[8,8])) -> pred[] {
  %p = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p: (s32[], bf16[8,8])) -> (s32[], bf16[8,8]) {
  %p = (s32[], bf16[8,8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %w = bf16[8,8]{1,0} get-tuple-element(%p), index=1
  %gathered = bf16[32,8]{1,0} all-gather(%w), channel_id=1, dimensions={0}
  %y = bf16[8,8]{1,0} fusion(%w, %gathered), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"1000"}
  %sum-start = f32[16]{0} all-reduce-start(%y), channel_id=2, to_apply=%add
  %z = bf16[8,8]{0,1} copy(%y), backend_config={"estimated_cycles":"30"}
  %v = bf16[8,8]{1,0} fusion(%z), kind=kLoop, calls=%add, backend_config={"estimated_cycles":"70"}
  %sum = f32[16]{0} all-reduce-done(%sum-start)
  ROOT %t = (s32[], bf16[8,8]) tuple(%next, %v)
}

ENTRY %main (w: bf16[8,8]) -> bf16[8,8] {
  %w = bf16[8,8]{1,0} parameter(0)
  %k = bf16[8,8]{1,0} custom-call(%w), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/attend/forward"}
  %zero = s32[] constant(0)
  %start = (s32[], bf16[8,8]) tuple(%zero, %k)
  %loop = (s32[], bf16[8,8]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,8]{1,0} get-tuple-element(%loop), index=1
}
"""


@pytest.fixture(scope="module")
def schedule():
    return schedule_of(read_program(PROGRAM))


def test_cycles_are_counted_by_what_they_do_and_with_the_trips_of_loops(schedule):
    assert {name: cycles for name, cycles in schedule.cycles.items() if cycles} == {
        "products": 5 * 1000, "copies": 5 * 30, "other": 5 * 70}
    assert schedule.cycles["copies"] / schedule.cycles.total() == pytest.approx(30 / 1100)


def test_kernels_are_counted_by_their_runs_since_they_have_no_estimate(schedule):
    assert schedule.kernels == {"forward": 1}


def test_a_transfer_stands_in_line_or_travels_behind_the_work_until_its_end(schedule):
    assert schedule.transfers == [Transfer("all-gather", 32 * 8 * 2, 5, None), Transfer("all-reduce", 16 * 4, 5, 100)]


def test_the_core_waits_for_what_no_work_hides(schedule):
    slow_links, clock = 1e3, 1e3  # 512 bytes in line take 0.512 s; of the 0.064 s of the sum 0.1 s are hidden
    waited, hidden = schedule.waiting(slow_links, clock)
    assert waited == pytest.approx(5 * 0.512) and hidden == pytest.approx(64 / 576)
    waited, hidden = schedule.waiting(slow_links / 2, clock)  # 0.128 s, of which 0.1 s are hidden
    assert waited == pytest.approx(5 * (1.024 + 0.028)) and hidden == pytest.approx(0.1 / (1.024 + 0.128))


@pytest.mark.parametrize("line, operation, size", [
    ("bf16[8,128]{1,0:T(8,128)(2,1)S(1)} fusion(%a), calls=%f, metadata={op_name=\"while(\"}", "fusion", 2048),
    ("(bf16[4]{0}, u32[]{:S(2)}) copy-start(%all-gather.17)", "copy-start", 12),
    ("f32[] parameter(0)", "parameter", 4)])
def test_an_instruction_has_an_operation_and_a_size(line, operation, size):
    assert opcode(line) == operation and size_of(line) == size


def test_kernels_take_as_long_as_the_tiles_that_they_visit():
    config = load_config("diffullama_7b", ["train.global_batch_size=128", "train.grad_accum_steps=1"])
    assert computed_pairs(config) == 2048**2  # bidirectional, once annealing is over
    run = kernel_run(config, SHAPES["meta-llama/Llama-2-7b-hf"], 64, "TPU v5", device_spec("TPU v5"))
    tiles, clock = 2 * 2048**2 * 32 / (512 * 1024), device_spec("TPU v5").clock  # of one layer; each chip has two cores
    assert run["attention_forward"] == pytest.approx(tiles * 2048 / 2 / clock)
    assert run["attention_backward"] == pytest.approx(tiles * 5120 / 2 / clock)
    assert run["rotate"] == pytest.approx(2 * 2 * (2 * 2048 * 4096) * 2 / 2.765e12)  # q and k, in and out, in bfloat16
    assert run["norm_and_rotate"] == run["rotate"] and run["norm_and_rotate_backward"] == 1.5 * run["rotate"]
    assert kernel_seconds(run, "attention_backward_3_of_4") == run["attention_backward"] / 4
    blocks = load_config("diffullama_7b", ["recipe=bd3lm"])
    assert 1.0 < computed_pairs(blocks) / 2048**2 < 1.2  # two streams: not 4
