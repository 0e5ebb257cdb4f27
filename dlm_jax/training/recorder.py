"""What happens to the metrics of a step: they are checked, logged and shown, one step late."""

from collections.abc import Callable

import jax

from dlm_jax.config import Config
from dlm_jax.errors import UserError
from dlm_jax.training.goodput import GoodputClock
from dlm_jax.training.metrics import NoLog
from dlm_jax.training.progress import ProgressBar
from dlm_jax.training.step import Metrics


class Recorder:
    """Keeps the metrics of the newest step until the next one is dispatched, and waits for them then: the device always
    has its next step, and the host is never more than one step ahead of it, so that a run stops within two steps.
    `flush` records them at once."""

    def __init__(self, config: Config, log: NoLog, bar: ProgressBar, clock: GoodputClock,
                 throughput: Callable[[float], dict[str, float]]) -> None:
        self.skipped = 0  # steps skipped in total, as of the last check
        self._config, self._log, self._bar, self._clock = config, log, bar, clock
        self._throughput = throughput  # seconds per step -> what follows from them, such as tokens per second
        self._pending: tuple[int, Metrics] | None = None

    def record(self, step: int, metrics: Metrics) -> None:
        """Advances the bar, waits for the previous step and records it, then keeps this one."""
        self._bar.advance(step)
        self._clock.spend("host")
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Waits until the device has computed what is pending, and records it if it is to be logged. Raises `UserError`
        as `check` does."""
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        jax.block_until_ready(metrics)
        self._clock.spend("device")
        if step % self._config.log.every and step != self._config.train.steps:
            return
        values = self.check(step, metrics)
        seconds = self._clock.per_step(step)
        values |= seconds | self._throughput(seconds["seconds_per_step"])
        self._log.training(step, values)
        self._bar.report(step, values)
        self._clock.spend("host")

    def check(self, step: int, metrics: Metrics) -> dict[str, float]:
        """The metrics as numbers. Raises `UserError` if too many steps in a row were skipped."""
        values = {name: float(value) for name, value in metrics.items()}
        in_a_row, limit = int(values.pop("skipped_in_a_row")), self._config.optimizer.max_skipped_steps
        self.skipped = int(values["skipped"])
        if in_a_row:
            self._bar.log(f"step {step}: non-finite loss or gradient; skipped {in_a_row} in a row")
        if in_a_row > limit:
            raise UserError(f"up to step {step} the loss or its gradient was non-finite {in_a_row} times in a row, "
                            f"more than optimizer.max_skipped_steps = {limit}; start over in another work directory "
                            "with a lower optimizer.learning_rate or optimizer.grad_clip_norm")
        return values

    def validation(self, step: int, nelbo: float) -> None:
        """Logs and shows the validation NELBO, in nats per token."""
        self._log.validation(step, {"nelbo": nelbo})
        self._bar.validated(step, nelbo)

    def samples(self, step: int, texts: list[str]) -> None:
        """Logs the texts that the model wrote after a step, and shows the first."""
        self._log.samples(step, texts)
        self._bar.log(f"step {step}, a sample: {texts[0]!r}")
