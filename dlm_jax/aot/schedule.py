"""Where the time of a compiled TPU step goes, by the compiler's own schedule.

The text of a compiled program lists its operations in the order in which they will run, and beside each fusion and copy
how many cycles the compiler expects of it. It is a cost model and no clock: good for ratios between programs of one
compiler, and for finding what is in the way.
"""

import dataclasses
import re
from collections import Counter

from dlm_jax.aot.hlo import KINDS, LOOP, SHAPE, Computation, parse, shape_bytes, trips

OPCODE = re.compile(r"[\s)}\]]([a-z][a-z0-9-]*)\(")
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?%?([\w.-]+)")
OPERAND = re.compile(r"%([\w.-]+)")
NAME = re.compile(r'op_name="([^"]*)"')
MEMORY_MOVES = ("copy", "slice", "dynamic-slice")  # whose -start and -done are within the chip


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective of the program."""

    kind: str
    size: int  # bytes of its result
    runs: int
    meanwhile: int | None  # cycles of other work until its result is needed; None: it stands in line


@dataclasses.dataclass
class Schedule:
    """A program's operations, counted with the trips of its loops."""

    cycles: Counter[str] = dataclasses.field(default_factory=Counter)  # of 'products', 'copies' and 'other'
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)  # runs of each; the compiler estimates none
    transfers: list[Transfer] = dataclasses.field(default_factory=list)

    def waiting(self, bandwidth: float, clock: float) -> tuple[float, float]:
        """(seconds that the core waits for transfers, share of their bytes that travels behind work), for links of so
        many bytes per second and a clock in Hz. Each transfer counts as if it had the links for itself."""
        waited = total = 0.0
        for transfer in self.transfers:
            seconds = transfer.size / bandwidth
            total += transfer.runs * seconds
            waited += transfer.runs * max(0.0, seconds - (transfer.meanwhile or 0) / clock)
        return waited, 1 - waited / total if total else 1.0


def read_schedule(text: str) -> Schedule:
    """The schedule of a compiled program, from its text."""
    computations, entry = parse(text)
    reader = _Reader(computations)
    reader.visit(entry, 1)
    return reader.schedule


class _Reader:
    """Walks through the computations of a program in the order in which they run."""

    def __init__(self, computations: dict[str, Computation]) -> None:
        self.computations, self.schedule = computations, Schedule()

    def visit(self, name: str, runs: int) -> int:
        """Counts a computation that runs so often; returns the cycles of one run."""
        done, started = 0, dict[str, tuple[str, int]]()
        for instruction, line in self.computations.get(name, {}).items():
            operation = opcode(line)
            base = operation.removesuffix("-start").removesuffix("-update").removesuffix("-done")
            if operation == "while":
                done += self._loop(line, runs)
            elif operation in ("call", "conditional"):
                done += sum(self.visit(called, runs) for called in CALLED.findall(line))
            elif operation == base or base in MEMORY_MOVES:
                done += self._single(operation, line, runs)
            elif operation.endswith("-start"):
                if kind := self._collective(base, line):
                    started[instruction] = kind, done
            else:
                self._goes_on(operation, instruction, line, started, done, runs)
        return done

    def _loop(self, line: str, runs: int) -> int:
        condition, body = LOOP.search(line).groups()  # type: ignore[union-attr]
        count = trips(line, self.computations.get(condition, {}), self.computations.get(body, {}))
        return count * self.visit(body, runs * count)

    def _single(self, operation: str, line: str, runs: int) -> int:
        """An operation that the core runs from its beginning to its end; returns its cycles."""
        estimate = CYCLES.search(line)
        cycles = int(estimate[1]) if estimate else 0
        if kind := self._collective(operation, line):
            self.schedule.transfers.append(Transfer(kind, size_of(line), runs, None))
        if operation == "custom-call" and "tpu_custom_call" in line:
            name = NAME.search(line)
            self.schedule.kernels[name[1].rpartition("/")[2] if name else "unnamed"] += runs
        self.schedule.cycles[self._sort(operation, line)] += cycles * runs
        return cycles

    def _goes_on(self, operation: str, instruction: str, line: str, started: dict[str, tuple[str, int]], done: int,
                 runs: int) -> None:
        """The next part of something that was started: an update passes it on, its end makes it a transfer."""
        for operand in OPERAND.findall(line):
            if operand in started:
                kind, since = started.pop(operand)
                if operation.endswith("-update"):
                    started[instruction] = kind, since
                else:
                    self.schedule.transfers.append(Transfer(kind, size_of(line), runs, done - since))
                return

    def _sort(self, operation: str, line: str) -> str:
        """What an operation is: a product of matrices, a copy, or something else."""
        if operation.startswith("copy"):
            return "copies"
        inside = [part for called in CALLED.findall(line) for part in self.computations.get(called, {}).values()]
        return "products" if any(opcode(part) in ("convolution", "dot") for part in (line, *inside)) else "other"

    def _collective(self, operation: str, line: str, depth: int = 3) -> str | None:
        """The kind of collective that an operation is or, a few calls deep, contains; None if it is none."""
        if operation in KINDS:
            return operation
        if operation not in ("fusion", "async", "call", "custom-call") or not depth:
            return None
        parts = [part for called in CALLED.findall(line) for part in self.computations.get(called, {}).values()]
        return next((kind for part in parts if (kind := self._collective(opcode(part), part, depth - 1))), None)


def opcode(line: str) -> str:
    """The operation of an instruction, such as `fusion` or `all-gather-start`; empty if there is none."""
    head = re.sub(r"\{[^{}]*\}", "", line.split(", metadata=")[0].split(", backend_config=")[0])
    found = OPCODE.search(" " + head)
    return found[1] if found else ""


def size_of(line: str) -> int:
    """Bytes of an instruction's result."""
    head = line.split(f" {opcode(line)}(")[0]
    return sum(shape_bytes(kind, shape) for kind, shape in SHAPE.findall(head))
