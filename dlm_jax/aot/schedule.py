"""Where the time of a compiled TPU step goes, by the compiler's own schedule.

It is a cost model and no clock: good for ratios between programs of one compiler, and for finding what is in the way.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

from dlm_jax.aot.hlo import KINDS
from dlm_jax.aot.program import Event, Loop


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


def schedule_of(program: Sequence[Event | Loop]) -> Schedule:
    """The schedule of a program that `read_program` gave."""
    schedule = Schedule()
    _count(program, schedule, 1)
    return schedule


def _count(operations: Sequence[Event | Loop], schedule: Schedule, runs: int) -> int:
    """Counts operations that run so often; returns the cycles of one run."""
    done, started = 0, dict[str, int]()
    for each in operations:
        if isinstance(each, Loop):
            done += each.trips * _count(each.body, schedule, runs * each.trips)
        elif each.part == "start":
            started[each.transfer] = done
        elif each.kind in KINDS:
            meanwhile = done - started[each.transfer] if each.part == "done" else None
            schedule.transfers.append(Transfer(each.kind, each.size, runs, meanwhile))
        elif each.kind == "kernels":
            schedule.kernels[each.name] += runs
        else:
            schedule.cycles[each.kind] += each.cycles * runs
            done += each.cycles
    return done
