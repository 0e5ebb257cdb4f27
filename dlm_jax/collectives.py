"""What a compiled program sends between devices, read off its text with the trip counts of its loops."""

import math
import re
from collections import Counter

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8,
         "s64": 8, "u64": 8}
COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.-]+) \(.*\{$")
OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(?:-start)?\(")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
CALLED = re.compile(r"(?:body|to_apply|calls|condition|called_computations)=\{?%?([\w.-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that one device receives in collectives, by kind, from the text of a compiled program (HLO).

    The size of a result stands for its traffic; a reduce-scatter receives its operand, of which the result is a part.
    """
    own: dict[str, Counter[str]] = {}
    calls: dict[str, list[tuple[str, int]]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        begins = COMPUTATION.match(line)
        if begins:
            current = begins[1]
            own[current], calls[current] = Counter(), []
            entry = current if line.startswith("ENTRY") else entry
            continue
        operation = OPERATION.search(line)
        if operation and current:
            kind = operation[2]
            sizes = [_bytes(*shape) for shape in SHAPE.findall(operation[1])]
            # An asynchronous start names operand and result: the larger of the two is what travels.
            own[current][kind] += max(sizes, default=0) * (_group(line) if kind == "reduce-scatter" else 1)
        trips = TRIPS.search(line)
        calls.get(current, []).extend((name, int(trips[1]) if trips else 1) for name in CALLED.findall(line))
    return dict(_total(entry, own, calls))


def _total(name: str, own: dict[str, Counter[str]], calls: dict[str, list[tuple[str, int]]]) -> Counter[str]:
    total = Counter(own.get(name, {}))
    for called, times in calls.get(name, []):
        for kind, size in _total(called, own, calls).items():
            total[kind] += times * size
    return total


def _bytes(kind: str, sizes: str) -> int:
    return BYTES.get(kind, 0) * math.prod(int(n) for n in sizes.split(",") if n)


def _group(line: str) -> int:
    """How many devices take part."""
    iota = re.search(r"replica_groups=\[\d+,(\d+)\]", line)
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    return int(iota[1]) if iota else listed[1].count(",") + 1 if listed else 1
