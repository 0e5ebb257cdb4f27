"""The training loop: batch, step, record; and at intervals validate and save."""

import dataclasses
import math
from collections.abc import Callable

import jax

from dlm_jax.config import Config
from dlm_jax.errors import Stopped, UserError
from dlm_jax.training.batches import Batch
from dlm_jax.training.goodput import GoodputClock
from dlm_jax.training.profile import Profile
from dlm_jax.training.recorder import Recorder
from dlm_jax.training.saver import Saver
from dlm_jax.training.step import Metrics, TrainState
from dlm_jax.training.watchdog import StopRequest


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop uses from its first step to its last."""

    config: Config
    next_batch: Callable[[TrainState], Batch]  # the global batch of the next step, on the devices
    step_at: Callable[[int], jax.stages.Compiled]  # steps done -> the compiled step that comes next
    recorder: Recorder  # logs and shows metrics
    evaluate: Callable[[int, TrainState], float]  # (step, state) -> validation NELBO, which it logs
    saver: Saver  # writes checkpoints
    stop_request: StopRequest  # whether the run should stop after a step
    alive: Callable[[], None]  # reports a finished step to the watchdog
    profile: Profile
    clock: GoodputClock


def train_loop(run: Run, state: TrainState) -> float:
    """Runs all remaining steps and returns the last validation NELBO, in nats per token (NaN without any step).

    Metrics are read one step late, so the device never waits for the host, which is one step ahead of it. Validation
    and checkpoints never run ahead of the log, so a run that is killed right after them has lost no line. Raises
    `Stopped` if the run was asked to stop, with its state saved, and `UserError` if it has diverged.
    """
    nelbo, last_step = math.nan, run.config.train.steps
    run.clock.begin(int(state.step))
    for step in range(int(state.step) + 1, last_step + 1):
        state, metrics = dispatch(run, step, state)
        run.recorder.record(step, metrics)
        last, stop = step == last_step, run.stop_request.at(step)
        validates = last or step % run.config.evaluate.every == 0
        saves = last or stop or run.saver.due(step)
        if validates or saves:
            run.recorder.flush()
        if validates:
            nelbo = run.evaluate(step, state)
        if saves:
            run.recorder.check(step, metrics)
            if last and not math.isfinite(nelbo):
                raise UserError(f"the validation NELBO after the last step is {nelbo}; start over in another work "
                                "directory with a lower optimizer.learning_rate")
            saved = run.saver.save(step, state)
        if stop and not last:
            raise Stopped(f"the run was asked to stop and {where(run, step, saved)}; rerun the same command to resume",
                          run.stop_request.signal)
    return nelbo


def where(run: Run, step: int, saved: bool) -> str:
    """What a run that stops after a step has saved."""
    if saved:
        return f"is saved at step {step} in {run.saver.directory}"
    return f"skipped step {step}, so its checkpoint is older"


def dispatch(run: Run, step: int, state: TrainState) -> tuple[TrainState, Metrics]:
    """Hands one step to the device.

    The call itself counts as device time: a CPU computes the step during it, and a device that has fallen behind makes
    the host wait in it.
    """
    run.profile.before(step)
    batch = run.next_batch(state)  # charges the wait for it to the clock
    compiled = run.step_at(step - 1)
    run.clock.spend("host")
    state, metrics = compiled(state, *batch)
    run.clock.spend("device")
    run.profile.after(step, metrics)
    run.alive()
    return state, metrics
