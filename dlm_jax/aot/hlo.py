"""What a compiled program sends between devices, read from its HLO text and the trip counts of its loops."""

import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^  (ROOT )?%?([\w.-]+) = (.*)$")
OPERATION = re.compile(rf"^(.*?) ({'|'.join(KINDS)})(?:-start)?\(")
CHANNEL = re.compile(r"channel_id=(\d+)")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls|condition|called_computations)=\{?%?([\w.-]+)")
LOOP = re.compile(r"condition=%?([\w.-]+), body=%?([\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
OPERANDS = re.compile(r"%([\w.-]+)(?=[,)])")

ROOT = "ROOT"
Computation = dict[str, str]  # each instruction by its name; the last one is ROOT


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that one device receives in collectives, by kind, from the HLO text of a compiled program.

    The size of the result is taken as the traffic, and for a reduce-scatter the size of its operand. A collective that
    starts in one computation and ends in another has one channel id, and counts once.
    """
    computations, entry = parse(text)
    times: Counter[str] = Counter()

    def visit(name: str, runs: int) -> None:
        times[name] += runs
        for line in computations.get(name, {}).values():
            loop = LOOP.search(line)
            parts = [computations.get(part, {}) for part in loop.groups()] if loop else []
            for called in CALLED.findall(line):
                visit(called, runs * (trips(line, *parts) if parts else 1))

    visit(entry, 1)
    channels: dict[str, tuple[str, int]] = {}
    for computation, lines in computations.items():
        for name, line in lines.items():
            operation, channel = OPERATION.search(line), CHANNEL.search(line)
            if operation:
                key = channel[1] if channel else f"{computation} {name}"
                seen = operation[2], received(operation, line) * times[computation]
                channels[key] = max(channels.get(key, seen), seen, key=lambda each: each[1])
    total: Counter[str] = Counter()
    for kind, size in channels.values():
        total[kind] += size
    return {kind: size for kind, size in total.items() if size}


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of its entry."""
    found: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        begins, instruction = COMPUTATION.match(line), INSTRUCTION.match(line)
        if begins:
            current = found[begins[1]] = {}
            entry = begins[1] if line.startswith("ENTRY") else entry
        elif instruction:
            current[ROOT if instruction[1] else instruction[2]] = instruction[3]
    return found, entry


def trips(line: str, condition: Computation, body: Computation) -> int:
    """How many times a loop runs: as the compiler says or, for `while (i < limit) i += step`, limit / step."""
    known = TRIPS.search(line)
    if known:
        return int(known[1])
    sides = OPERANDS.findall(condition.get(ROOT, "").split(", direction")[0] + ")")
    limits = [value for value in (constant(condition, side) for side in sides) if value is not None]
    counter = [index[1] for side in sides if (index := re.search(r"index=(\d+)", condition.get(side, "")))]
    if not limits or not counter:
        return 1
    following = OPERANDS.findall(body[ROOT])[int(counter[0])]
    steps = [value for value in (constant(body, name) for name in OPERANDS.findall(body.get(following, ""))) if value]
    return -(-limits[0] // (steps[0] if steps else 1))


def constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, else None."""
    value = re.search(r"^[su]32\[\]\S* constant\((\d+)\)", computation.get(name, ""))
    return int(value[1]) if value else None


def received(operation: re.Match[str], line: str) -> int:
    """Bytes that one device receives in one collective."""
    sizes = [shape_bytes(kind, shape) for kind, shape in SHAPE.findall(operation[1]) if shape]
    if "-start(" in operation[0] and operation[2] != "all-reduce":  # operands and results; the larger travels
        half = len(sizes) // 2
        return max(sum(sizes[:half]), sum(sizes[half:]))
    return sum(sizes) * (group(line) if operation[2] == "reduce-scatter" else 1)


def shape_bytes(kind: str, shape: str) -> int:
    """Bytes of an array, from its dtype and its sizes separated by commas."""
    return BYTES.get(kind, 0) * math.prod(int(n) for n in shape.split(",") if n)


def group(line: str) -> int:
    """Number of devices that take part in a collective."""
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return int(iota[1]) if iota else listed[1].count(",") + 1 if listed else 1
