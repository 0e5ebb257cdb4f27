"""Goodput, the fraction of a run's wall time that goes into training steps: every second is charged to one kind of
work."""

import time
from collections import defaultdict

# The parts of a step: waiting for its records; placing them, logging and watching; the device's own time.
STEP = ("data", "host", "device")


class GoodputClock:
    """Seconds spent on each kind of work: `start`, those of STEP, `validation`, `saving`, `end`."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()
        self._reported: dict[str, float] = dict.fromkeys(STEP, 0.0)
        self._reported_step = 0

    def spend(self, kind: str) -> None:
        """Charges the time since the last call to `kind`."""
        now = time.perf_counter()
        self.spent[kind] += now - self._mark
        self._mark = now

    def begin(self, step: int) -> None:
        """Ends the start of the run; `step` steps are done already."""
        self.spend("start")
        self._reported_step = step

    def per_step(self, step: int) -> dict[str, float]:
        """Mean seconds per step since the last call, and how many of them the device waited for records (data) and for
        the host."""
        steps = max(step - self._reported_step, 1)
        mean = {kind: (self.spent[kind] - self._reported[kind]) / steps for kind in STEP}
        self._reported_step, self._reported = step, {kind: self.spent[kind] for kind in STEP}
        return {"seconds_per_step": sum(mean.values()), "data_seconds": mean["data"], "host_seconds": mean["host"]}

    def elapsed(self) -> float:
        """Wall seconds of the run so far."""
        self.spend("end")
        return sum(self.spent.values())

    def goodput(self) -> float:
        """The fraction of the time that went into steps."""
        return sum(self.spent[kind] for kind in STEP) / sum(self.spent.values())
