"""A profile of what the devices do in some steps of a run."""

from pathlib import Path

import jax


class Profile:
    """A profile of some steps of a run, for TensorBoard or Perfetto, in the directory `out`. None: no profile."""

    def __init__(self, out: Path, steps: tuple[int, int] | None) -> None:
        self._out, self._steps, self._running = out, steps, False

    def before(self, step: int) -> None:
        """To be called before a step."""
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._running:
            jax.profiler.start_trace(str(self._out))
            self._running = True

    def after(self, step: int, result: object) -> None:
        """To be called after a step is dispatched, with what it returns."""
        if self._running and self._steps and step >= self._steps[1]:
            jax.block_until_ready(result)
            self.close()

    def close(self) -> None:
        """Writes what has been recorded."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
