"""A compiled GPU program as its operations in the order in which they run, each at the chip's peak.

The GPU compiler says in which order operations start and what travels meanwhile, but not how long they take. So a
product of matrices counts as long as the tensor cores need for it, and anything else as long as memory needs for what
is read and written. Both are lower bounds.
"""

import math
import re

from dlm_jax.aot.hlo import OPERANDS, ROOT, SHAPE, Computation, parse
from dlm_jax.aot.program import CALLED, Event, Loop, Reader, opcode, size_of
from dlm_jax.parallel.device_specs import DeviceSpec

CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
NOT_RUN = ("parameter", "constant", "bitcast", "tuple", "get-tuple-element", "partition-id", "")
# What a fusion that only moves data consists of, beside the numbers that say where it goes.
MOVES = ("copy", "transpose", "reshape", "slice", "dynamic-slice", "dynamic-update-slice", "concatenate", "pad",
         *NOT_RUN)
TAKES = ("dynamic-slice", "slice", "gather")  # of their first operand they read as much as they give
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}  # into their first operand they write this one


def read_gpu_program(text: str, peak: DeviceSpec) -> tuple[Event | Loop, ...]:
    """The operations of a compiled GPU program that take time, from its text."""
    computations, entry = parse(text)
    return GpuReader(computations, peak).operations(entry)


class GpuReader(Reader):
    """Reads the program for a GPU with these peaks."""

    def __init__(self, computations: dict[str, Computation], peak: DeviceSpec) -> None:
        super().__init__(computations)
        self.peak = peak

    def cycles(self, line: str, lines: Computation) -> int:
        """Cycles at the peak of the tensor cores or of memory, whichever is longer; of a collective none."""
        if opcode(line) in NOT_RUN or self._collective(line):
            return 0
        called = [self.computations.get(name, {}) for name in CALLED.findall(line)] if opcode(line) == "fusion" else []
        flops = sum(dot_flops(part, inner) for inner in called for part in inner.values()) + dot_flops(line, lines)
        moved = sum(map(fusion_bytes, called)) if called else size_of(line) + sum(
            size_of(lines[name]) for name in operands(line) if name in lines)
        return math.ceil(max(flops / self.peak.flops_per_cycle, moved / self.peak.bandwidth * self.peak.clock))

    def sort(self, operation: str, line: str) -> str:
        """A fusion that only moves data is a copy, too."""
        sort, inside = super().sort(operation, line), self.inside(line)
        moves = inside and all(opcode(part) in MOVES or elements(part) == 1 for part in inside)
        return "copies" if sort == "other" and moves else sort


def dot_flops(line: str, lines: Computation) -> int:
    """Floating-point operations of an instruction among `lines` if it is a product of matrices, else 0."""
    if opcode(line) != "dot":
        return 0
    left = shape(lines[operands(line)[0]])
    contracted = CONTRACTED.search(line)
    assert contracted is not None
    return 2 * elements(line) * math.prod(left[int(axis)] for axis in contracted[1].split(",") if axis)


def fusion_bytes(inner: Computation) -> int:
    """Bytes that a fusion reads and writes: of an array from which it takes slices only those, and of one that it
    updates in place only what is written."""
    read = sum(bytes_read(name, inner) for name, line in inner.items() if opcode(line) == "parameter")
    results = operands(inner[ROOT]) if opcode(inner[ROOT]) == "tuple" else [ROOT]
    return read + sum(bytes_written(inner[name], inner) for name in results)


def bytes_read(name: str, inner: Computation) -> int:
    """Of what a fusion calls `name`, the bytes that it reads."""
    total = 0
    for user, line in inner.items():
        if name in (names := operands(line)):
            operation, first = opcode(line), names[0] == name
            if operation == "bitcast" and user != ROOT:
                total += bytes_read(user, inner)
            elif operation in TAKES and first:
                total += size_of(line)
            elif not (operation in IN_PLACE and first):
                return size_of(inner[name])
    return min(total, size_of(inner[name]))


def bytes_written(line: str, inner: Computation) -> int:
    """Bytes of a fusion's result that it writes."""
    if opcode(line) == "bitcast" and (names := operands(line)) and names[0] in inner:
        return bytes_written(inner[names[0]], inner)
    written = IN_PLACE.get(opcode(line))
    return size_of(line) if written is None else size_of(inner[operands(line)[written]])


def operands(line: str) -> list[str]:
    """The names that an instruction is applied to."""
    inside = line.partition(f" {opcode(line)}(")[2].split("), ")[0] + ")"
    return OPERANDS.findall(inside)


def shape(line: str) -> list[int]:
    """The sizes of an instruction's result, if that is one array."""
    found = SHAPE.search(line)
    return [int(size) for size in found[2].split(",") if size] if found else []


def elements(line: str) -> int:
    """How many numbers an instruction's result has, if that is one array."""
    return math.prod(shape(line))
