"""Where the time of a run goes: every second of it is of one kind."""

import time
from collections import defaultdict

# What a step is made of: waiting for its records; placing them, logging and watching; the device's own time.
STEP = ("data", "host", "device")


class Clock:
    """Seconds by kind: `start`, those of STEP, `validation`, `saving`, `end`. Begins with the run."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()
        self._reported: dict[str, float] = dict.fromkeys(STEP, 0.0)
        self._step = 0

    def spend(self, kind: str) -> None:
        """All time since the last call was of this kind."""
        now = time.perf_counter()
        self.spent[kind] += now - self._mark
        self._mark = now

    def begin(self, step: int) -> None:
        """Step `step` is done, and the first of this process comes next."""
        self.spend("start")
        self._step = step

    def split(self, step: int) -> dict[str, float]:
        """Of one step, on the mean since the last call: seconds, and those of them without work for the device."""
        steps = max(step - self._step, 1)
        each = {kind: (self.spent[kind] - self._reported[kind]) / steps for kind in STEP}
        self._step, self._reported = step, {kind: self.spent[kind] for kind in STEP}
        return {"seconds_per_step": sum(each.values()), "data_seconds": each["data"], "host_seconds": each["host"]}

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        self.spend("end")
        return sum(self.spent.values())

    def goodput(self) -> float:
        """The share of the time that went into steps."""
        return sum(self.spent[kind] for kind in STEP) / sum(self.spent.values())
