"""The steps of a run, one after the other, and what happens between them."""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator

import jax

from dlm_jax.cluster import agreed
from dlm_jax.config import Config
from dlm_jax.errors import Stopped, UserError
from dlm_jax.mesh import whole_batch
from dlm_jax.models.weights import Params
from dlm_jax.training.checkpoint import Checkpoints
from dlm_jax.training.clock import Clock
from dlm_jax.training.metrics import NoLog
from dlm_jax.training.progress import Progress
from dlm_jax.training.step import Metrics, State
from dlm_jax.training.watch import Trace


@dataclasses.dataclass
class Steps:
    """What the steps of a run need.

    step_at: steps done -> the compiled step; batches: its records; sources: steps done -> where they are from, if they
    are told apart; whole: state -> the model's parameters; validate: parameters -> nats a token; texts: parameters ->
    samples; speed: seconds a step -> what follows from them for the log; ends: step number -> whether the run is to
    end there; alive, saved: to be called after every step and after a checkpoint.
    """

    config: Config
    step_at: Callable[[int], Callable]
    batches: Iterator
    sources: Callable[[int], tuple]
    whole: Callable[[State], Params]
    validate: Callable[[Params], float]
    texts: Callable[[Params], list[str]] | None
    speed: Callable[[float], dict[str, float]]
    ends: Callable[[int], bool]
    alive: Callable[[], None]
    trace: Trace | None
    checkpoints: Checkpoints
    saved: Callable[[], None]
    log: NoLog
    progress: Progress
    clock: Clock
    skipped: int = 0

    def run(self, state: State) -> float:
        """All steps that are left; returns what the last validation found.

        Metrics are read one step late, so that the device never waits for the host; but validation and checkpoints
        never run ahead of the log, so that a run that is killed after them has lost no line. Raises `Stopped` where the
        run was asked to end, with its state saved.
        """
        config, waiting, after = self.config, None, math.nan
        saved, start = time.monotonic(), int(state.step)
        self.clock.begin(start)
        for number in range(start + 1, config.train.steps + 1):
            state, metrics = self.one(number, state)
            self.write(waiting)
            last, ends = number == config.train.steps, self.ends(number)
            waiting = (number, metrics) if number % config.log.every == 0 or last else None
            validates = number % config.evaluate.every == 0 or last
            saves = number % config.checkpoint.every == 0 or last or ends or self.time_is_up(number, saved)
            if validates or saves:
                self.write(waiting)
                waiting = None
            if validates:
                after = self.validated(number, self.whole(state))
            if saves:
                self.checked(number, metrics)
                self.checkpoints.save(number, state)
                self.saved()
                saved = time.monotonic()
                self.clock.spend("saving")
            if ends and not last:
                raise Stopped(f"the run was asked to end and is saved at step {number}; the same command goes on")
        return after

    def one(self, number: int, state: State) -> tuple[State, Metrics]:
        """Hands one step to the device. That is the device's time: a CPU computes it meanwhile, and a device that is
        behind makes the host wait there."""
        if self.trace:
            self.trace.before(number)
        rows = (*next(self.batches), *self.sources(number - 1))
        self.clock.spend("data")
        rows = tuple(whole_batch(part, self.config.train.batch) for part in rows)
        step = self.step_at(number - 1)
        self.clock.spend("host")
        state, metrics = step(state, *rows)
        self.clock.spend("device")
        if self.trace:
            self.trace.after(number, metrics)
        self.progress.advance(number)
        self.alive()
        self.clock.spend("host")
        return state, metrics

    def time_is_up(self, number: int, saved: float) -> bool:
        """Whether `checkpoint.minutes` have passed, by the clock of the first process, asked at logged steps."""
        minutes, logged = self.config.checkpoint.minutes, number % self.config.log.every == 0
        return bool(minutes and logged and agreed(time.monotonic() - saved >= 60 * minutes))

    def write(self, waiting: tuple[int, Metrics] | None) -> None:
        """Logs the metrics of a step, when the device has them."""
        if waiting is None:
            return
        number, metrics = waiting
        jax.block_until_ready(metrics)
        self.clock.spend("device")
        values = self.checked(number, metrics)
        split = self.clock.split(number)
        values = {**values, **split, **self.speed(split["seconds_per_step"])}
        self.log.training(number, values)
        self.progress.report(number, values)
        self.clock.spend("host")

    def checked(self, number: int, metrics: Metrics) -> dict[str, float]:
        """The metrics of a step. Raises `UserError` where too many steps in a row came to nothing."""
        values = {name: float(value) for name, value in metrics.items()}
        in_a_row, limit = int(values.pop("skipped_in_a_row")), self.config.optimizer.skip
        self.skipped = int(values["skipped"])
        if in_a_row:
            self.progress.say(f"step {number}: loss or gradient is no finite number; skipped {in_a_row} in a row")
        if in_a_row > limit:
            raise UserError(f"until step {number} the loss or its gradient was no finite number {in_a_row} times in a "
                            f"row, more than optimizer.skip = {limit}; start anew in another work directory with a "
                            "lower optimizer.learning_rate or optimizer.clip")
        return values

    def validated(self, number: int, params: Params) -> float:
        """Validates, shows samples, and logs both."""
        nelbo = self.validate(params)
        self.log.validation(number, {"nelbo": nelbo})
        self.progress.validated(number, nelbo)
        if self.texts is not None:
            texts = self.texts(params)
            self.log.samples(number, texts)
            self.progress.say(f"step {number}, a sample: {texts[0]!r}")
        self.clock.spend("validation")
        return nelbo
