"""A compiled program as its operations in the order in which they run, from its text.

The TPU compiler writes beside each fusion and copy how many cycles it expects of it.
"""

import dataclasses
import re
from collections.abc import Iterator
from typing import Literal

from dlm_jax.aot.hlo import CHANNEL, KINDS, LOOP, OPERATION, SHAPE, Computation, parse, received, shape_bytes, trips

OPCODE = re.compile(r"[\s)}\]]([a-z][a-z0-9-]*)\(")
CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
CALLED = re.compile(r"(?:calls|to_apply|called_computations|branch_computations)=\{?%?([\w.-]+)")
OPERAND = re.compile(r"%([\w.-]+)")
NAME = re.compile(r'op_name="([^"]*)"')
PRODUCTS = ("convolution", "dot")
KERNELS = ("tpu_custom_call", "mosaic_gpu")  # what our kernels are called through
MEMORY_MOVES = ("copy", "slice", "dynamic-slice")  # whose -start and -done are within the chip


@dataclasses.dataclass(frozen=True)
class Event:
    """One operation."""

    kind: str  # 'products', 'copies', 'other', 'kernels', or the kind of a collective
    name: str  # where in the traced step it comes from; of a kernel its own name
    cycles: int = 0  # of the core; the compiler estimates none for kernels and collectives
    size: int = 0  # bytes of a collective's result
    part: Literal["all", "start", "done"] = "all"  # a collective may be started, and be needed later
    transfer: str = ""  # which one starts or is done


@dataclasses.dataclass(frozen=True)
class Loop:
    """A loop of the program."""

    trips: int
    body: "tuple[Event | Loop, ...]"  # of one trip


def read_program(text: str) -> tuple[Event | Loop, ...]:
    """The operations of a compiled TPU program that take time, from its text."""
    computations, entry = parse(text)
    return Reader(computations).operations(entry)


class Reader:
    """Walks through the computations of a program in the order in which they run. The methods `cycles` and `sort` are a
    compiler's own: these are for TPUs."""

    def __init__(self, computations: dict[str, Computation]) -> None:
        self.computations = computations
        self.underway: set[str] = set()  # collectives of which fusions carry pieces

    def operations(self, name: str) -> tuple[Event | Loop, ...]:
        """Those of a computation and of what it calls."""
        lines, found = self.computations.get(name, {}), list[Event | Loop]()
        # By the instruction that passes it on: its kind, what started it, and its bytes if they are known by then.
        started: dict[str, tuple[str, str, int]] = {}
        carried = {instruction: inner for instruction, line in lines.items() if opcode(line) == "fusion"
                   and (inner := self._collective(line))}
        pieces = [channel_of(inner) for inner in carried.values()]
        for instruction, line in lines.items():
            operation = opcode(line)
            base = operation.removesuffix("-start").removesuffix("-update").removesuffix("-done")
            if operation == "while":
                found.append(self._loop(line))
            elif operation in ("call", "conditional"):
                found += (each for called in CALLED.findall(line) for each in self.operations(called))
            elif instruction in carried:
                found += self._fused(line, carried[instruction], pieces, name)
            elif operation == base or base in MEMORY_MOVES:
                found += self._single(operation, line, instruction, lines)
            elif operation.endswith("-start"):
                if inner := self._collective(line, base):
                    kind, transfer = opcode(inner).removesuffix("-start"), f"{name} {instruction}"
                    stated = OPERATION.search(line)
                    started[instruction] = kind, transfer, received(stated, line) if stated else 0
                    found.append(Event(kind, origin(line), part="start", transfer=transfer))
            elif passed := next((operand for operand in OPERAND.findall(line) if operand in started), None):
                kind, transfer, size = started.pop(passed)
                if operation.endswith("-update"):
                    started[instruction] = kind, transfer, size
                else:
                    found.append(Event(kind, origin(line), size=size or size_of(line), part="done", transfer=transfer))
        return tuple(found)

    def _fused(self, line: str, inner: str, pieces: list[str], name: str) -> Iterator[Event]:
        """A fusion that carries a piece of a collective, often beside a product: the first piece starts it, and with
        the last it is done. `pieces` are the channels of this one's and later pieces; this one's is taken off."""
        kind, channel = opcode(inner), channel_of(inner)
        transfer = f"{name} {channel}"
        if transfer not in self.underway:
            self.underway.add(transfer)
            yield Event(kind, origin(inner), part="start", transfer=transfer)
        if cycles := self.cycles(line, self.computations[name]):
            yield Event(self.sort("fusion", line), origin(line), cycles)
        pieces.remove(channel)
        if channel not in pieces:
            self.underway.discard(transfer)
            yield Event(kind, origin(inner), size=size_of(inner), part="done", transfer=transfer)

    def _loop(self, line: str) -> Loop:
        condition, body = LOOP.search(line).groups()  # type: ignore[union-attr]
        count = trips(line, self.computations.get(condition, {}), self.computations.get(body, {}))
        return Loop(count, self.operations(body))

    def _single(self, operation: str, line: str, instruction: str, lines: Computation) -> list[Event]:
        """An operation that the core runs from its beginning to its end."""
        name = origin(line)
        if operation == "custom-call" and any(target in line for target in KERNELS):
            traced = name.removesuffix("/pallas_call").removesuffix("/mpmd_map").rpartition("/")[2]
            return [Event("kernels", traced or instruction.rstrip(".0123456789"))]
        inner, cycles = self._collective(line), self.cycles(line, lines)
        return ([Event(opcode(inner), name, size=size_of(line))] if inner else []) + (
            [Event(self.sort(operation, line), name, cycles)] if cycles else [])

    def cycles(self, line: str, lines: Computation) -> int:
        """How many cycles an instruction among `lines` takes; 0 if it takes none, or none are known."""
        estimate = CYCLES.search(line)
        return int(estimate[1]) if estimate else 0

    def sort(self, operation: str, line: str) -> str:
        """What an operation is: a product of matrices, a copy, or something else."""
        if operation.startswith("copy"):
            return "copies"
        return "products" if any(opcode(part) in PRODUCTS for part in (line, *self.inside(line))) else "other"

    def inside(self, line: str) -> list[str]:
        """The instructions of what an instruction calls."""
        return [part for called in CALLED.findall(line) for part in self.computations.get(called, {}).values()]

    def _collective(self, line: str, operation: str = "", depth: int = 3) -> str | None:
        """The instruction of the collective that one is or, a few calls deep, contains; None if it is none."""
        operation = operation or opcode(line)
        if operation in KINDS:
            return line
        if operation not in ("fusion", "async", "call", "custom-call") or not depth:
            return None
        return next((inner for part in self.inside(line) if (inner := self._collective(part, depth=depth - 1))), None)


def opcode(line: str) -> str:
    """The operation of an instruction, such as `fusion` or `all-gather-start`; empty if there is none."""
    head = re.sub(r"\{[^{}]*\}", "", line.split(", metadata=")[0].split(", backend_config=")[0])
    found = OPCODE.search(" " + head)
    return found[1] if found else ""


def channel_of(line: str) -> str:
    """The channel of a collective, which all of its pieces share."""
    found = CHANNEL.search(line)
    return found[1] if found else line


def origin(line: str) -> str:
    """The operation of the traced step that an instruction comes from, as a path; empty if it is not known."""
    name = NAME.search(line)
    return name[1] if name else ""


def size_of(line: str) -> int:
    """Bytes of an instruction's result."""
    head = line.split(f" {opcode(line)}(")[0]
    return sum(shape_bytes(kind, shape) for kind, shape in SHAPE.findall(head))
