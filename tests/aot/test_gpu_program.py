"""A compiled GPU program: in the order of the compiler, and each operation as long as the chip needs at its peak."""

import pytest

from dlm_jax.aot.gpu_program import GpuReader, read_gpu_program
from dlm_jax.aot.hlo import ROOT, collective_bytes
from dlm_jax.aot.program import Event, Loop
from dlm_jax.aot.schedule import Transfer, schedule_of
from dlm_jax.parallel.device_specs import DeviceSpec

# As the GPU compiler writes it, shortened. A loop of three trips: a slice of stacked weights is gathered behind a
# product, the result is written into a stack, and gradients are scattered behind a fusion; before the loop a kernel.
PROGRAM = """\
HloModule step, is_scheduled=true

%slice (p0: bf16[3,8,16], p1: s32[]) -> bf16[1,8,16] {
  %p0 = bf16[3,8,16]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %taken = bf16[1,8,16]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,16}
  ROOT %copied = bf16[1,8,16]{2,1,0} copy(%taken)
}

%product (a: bf16[64,32], b: bf16[32,16]) -> bf16[64,16] {
  %a = bf16[64,32]{1,0} parameter(0)
  %b = bf16[32,16]{1,0} parameter(1)
  ROOT %c = bf16[64,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%keep (stack: bf16[3,64,16], new: bf16[64,16], at: s32[]) -> bf16[3,64,16] {
  %stack = bf16[3,64,16]{2,1,0} parameter(0)
  %new = bf16[64,16]{1,0} parameter(1)
  %shaped = bf16[1,64,16]{2,1,0} bitcast(%new)
  %at = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %kept = bf16[3,64,16]{2,1,0} dynamic-update-slice(%stack, %shaped, %at, %zero, %zero)
}

%double (x: f32[100]) -> f32[100] {
  %x = f32[100]{0} parameter(0)
  ROOT %y = f32[100]{0} add(%x, %x)
}

%condition (p: (s32[], bf16[3,8,16], bf16[3,64,16])) -> pred[] {
  %p = (s32[], bf16[3,8,16], bf16[3,64,16]) parameter(0)
  ROOT %lt = pred[] constant(true)
}

%body (p: (s32[], bf16[3,8,16], bf16[3,64,16])) -> (s32[], bf16[3,8,16], bf16[3,64,16]) {
  %p = (s32[], bf16[3,8,16], bf16[3,64,16]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %weights = bf16[3,8,16]{2,1,0} get-tuple-element(%p), index=1
  %stacked = bf16[3,64,16]{2,1,0} get-tuple-element(%p), index=2
  %shard = bf16[1,8,16]{2,1,0} fusion(%weights, %i), kind=kLoop, calls=%slice
  %gather-start = (bf16[8,16]{1,0}, bf16[32,16]{1,0}) all-gather-start(%shard), channel_id=1, dimensions={0}
  %x = bf16[64,32]{1,0} copy(%i)
  %other = bf16[32,16]{1,0} copy(%i)
  %y = bf16[64,16]{1,0} fusion(%x, %other), kind=kCustom, calls=%product, metadata={op_name="closed_call/dot"}
  %gather = bf16[32,16]{1,0} all-gather-done(%gather-start)
  %z = bf16[3,64,16]{2,1,0} fusion(%stacked, %y, %i), kind=kLoop, calls=%keep
  %scatter-start = (f32[400]{0}, f32[100]{0}) reduce-scatter-start(%y), channel_id=2, replica_groups=[1,4]<=[4]
  %v = f32[100]{0} fusion(%i), kind=kLoop, calls=%double
  %scatter = f32[100]{0} reduce-scatter-done(%scatter-start)
  ROOT %t = (s32[], bf16[3,8,16], bf16[3,64,16]) tuple(%i, %weights, %z)
}

ENTRY %main (w: bf16[3,8,16]) -> bf16[3,64,16] {
  %w = bf16[3,8,16]{2,1,0} parameter(0)
  %k = bf16[3,64,16] custom-call(%w), custom_call_target="mosaic_gpu_v2", metadata={op_name="d_keys_kernel/mpmd_map"}
  %start = (s32[], bf16[3,8,16], bf16[3,64,16]) tuple(%w, %w, %k)
  %loop = (s32[], bf16[3,8,16]) while(%start), condition=%condition, body=%body, {"known_trip_count":{"n":"3"}}
  ROOT %out = bf16[3,64,16]{2,1,0} get-tuple-element(%loop), index=2
}
"""
# A cycle a second, in which it multiplies and adds 64 numbers or moves a byte; links move a byte in two.
PEAK = DeviceSpec(flops=128, memory=1e9, bandwidth=1, interconnect_bandwidth=0.5, flops_per_cycle=128)


@pytest.fixture(scope="module")
def program():
    return read_gpu_program(PROGRAM, PEAK)


def body(program):
    return next(each for each in program if isinstance(each, Loop))


def test_operations_come_in_order_and_loops_with_their_trips(program):
    assert program[0] == Event("kernels", "d_keys_kernel") and body(program).trips == 3
    kinds = [f"{event.kind} {event.part}" for event in body(program).body]
    assert kinds == ["copies all", "all-gather start", "copies all", "copies all", "products all", "all-gather done",
                     "copies all", "reduce-scatter start", "other all", "reduce-scatter done"]


def test_a_product_takes_its_operations_and_anything_else_the_bytes_that_it_moves(program):
    cycles = [event.cycles for event in body(program).body if event.cycles]
    sliced = 2 * 8 * 16 * 2 + 4  # the slice alone is read and written, and where it begins is read
    copies = [4 + 64 * 32 * 2, 4 + 32 * 16 * 2]
    product = max(2 * 64 * 32 * 16 / 128, 2 * (64 * 32 + 32 * 16 + 64 * 16))
    kept = 2 * 64 * 16 * 2 + 4  # of the stack only what is written
    assert cycles == [sliced, *copies, product, kept, 2 * 100 * 4]


def test_a_transfer_has_its_whole_bytes_and_the_work_that_runs_meanwhile(program):
    copies, product = 4 + 64 * 32 * 2 + 4 + 32 * 16 * 2, 2 * (64 * 32 + 32 * 16 + 64 * 16)
    schedule = schedule_of(program)
    assert schedule.transfers == [Transfer("all-gather", 32 * 16 * 2, 3, copies + product),
                                  Transfer("reduce-scatter", 400 * 4, 3, 800)]
    waited, hidden = schedule.waiting(PEAK.interconnect_bandwidth, PEAK.clock)
    assert waited == 3 * (3200 - 800) and hidden == pytest.approx((2048 + 800) / (2048 + 3200))


def test_of_what_is_scattered_and_gathered_in_place_only_the_rows_count():
    line = "f32[50,16] fusion(%x), calls=%f"
    cycles = []
    for operation in ("gather(%x, %i), offset_dims={1}", "scatter(%x, %i, %u), to_apply=%add"):
        given = "f32[4,16]" if operation.startswith("gather") else "f32[50,16]"
        inner = {"x": "f32[50,16] parameter(0)", "i": "s32[4,1] parameter(1)", "u": "f32[4,16] parameter(2)"}
        inner = {name: text for name, text in inner.items() if f"%{name}" in operation} | {ROOT: f"{given} {operation}"}
        cycles.append(GpuReader({"f": inner}, PEAK).cycles(line, {}))
    rows = 4 * 16 * 4
    assert cycles == [2 * rows + 4 * 4, 2 * rows + 4 * 4]


def test_a_started_sum_is_as_large_as_all_of_its_results():
    lines = ["ENTRY %m (a: f32[4], b: f32[6]) -> f32[4] {", "  %a = f32[4] parameter(0)", "  %b = f32[6] parameter(1)",
             "  ROOT %s = (f32[4], f32[6]) all-reduce-start(%a, %b), channel_id=1", "}"]
    assert collective_bytes("\n".join(lines)) == {"all-reduce": 40}
