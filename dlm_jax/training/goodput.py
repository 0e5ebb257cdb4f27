"""Where the time of a run goes: every second of it is charged to one kind of work."""

import time
from collections import defaultdict

# The parts of a step: waiting for its records; placing them, logging and watching; the device's own time.
STEP = ("data", "host", "device")


class GoodputClock:
    """Seconds by kind: `start`, those of STEP, `validation`, `saving`, `end`. It starts with the run."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._mark = time.perf_counter()
        self._reported: dict[str, float] = dict.fromkeys(STEP, 0.0)
        self._reported_step = 0

    def spend(self, kind: str) -> None:
        """Charges the time since the last call to this kind."""
        now = time.perf_counter()
        self.spent[kind] += now - self._mark
        self._mark = now

    def begin(self, step: int) -> None:
        """Starts counting steps: `step` of them are done."""
        self.spend("start")
        self._reported_step = step

    def per_step(self, step: int) -> dict[str, float]:
        """Seconds per step, averaged over the steps since the last call, and how many of them kept the device waiting
        for records (data) or for the host."""
        steps = max(step - self._reported_step, 1)
        mean = {kind: (self.spent[kind] - self._reported[kind]) / steps for kind in STEP}
        self._reported_step, self._reported = step, {kind: self.spent[kind] for kind in STEP}
        return {"seconds_per_step": sum(mean.values()), "data_seconds": mean["data"], "host_seconds": mean["host"]}

    def elapsed(self) -> float:
        """Seconds since the start."""
        self.spend("end")
        return sum(self.spent.values())

    def goodput(self) -> float:
        """The fraction of the time that went into steps."""
        return sum(self.spent[kind] for kind in STEP) / sum(self.spent.values())
