"""When a run saves its state, and what it refuses to save."""

import time
from pathlib import Path

import jax
import jax.numpy as jnp

from dlm_jax.config import Config
from dlm_jax.errors import UserError
from dlm_jax.models.weights import Params
from dlm_jax.parallel.distributed import broadcast_from_primary
from dlm_jax.runs.remote import push
from dlm_jax.training.checkpoint import Checkpoints
from dlm_jax.training.goodput import GoodputClock
from dlm_jax.training.step import TrainState
from dlm_jax.typing import Bool


class Saver:
    """Decides when a checkpoint is due (`checkpoint.every` steps, or `checkpoint.minutes`), and writes it."""

    def __init__(self, config: Config, checkpoints: Checkpoints, workdir: Path, clock: GoodputClock) -> None:
        self._config, self._checkpoints, self._workdir, self._clock = config, checkpoints, workdir, clock
        self._last_save = time.monotonic()
        self.directory = checkpoints.directory

    def due(self, step: int) -> bool:
        """Whether the config asks for a checkpoint after this step. To be called by all processes together."""
        return step % self._config.checkpoint.every == 0 or self._time_is_up(step)

    def _time_is_up(self, step: int) -> bool:
        """Asked at logged steps only, of the primary process's clock."""
        minutes, logged = self._config.checkpoint.minutes, step % self._config.log.every == 0
        if not minutes or not logged:
            return False
        return broadcast_from_primary(time.monotonic() - self._last_save >= 60 * minutes)

    def save(self, step: int, state: TrainState) -> bool:
        """Starts to write the state in the background, and copies the small files of a remote work directory. Returns
        whether it did.

        While steps are being skipped the run may have diverged, so nothing is written, lest the last good checkpoint be
        deleted for a newer one; the last step is an exception. Raises `UserError` for parameters that are not finite.
        """
        if int(state.skipped[0]) and step < self._config.train.steps:
            return False
        if not all_finite(state.params):
            raise UserError(f"after step {step} parameters are NaN or infinite, so they are not saved; start over in "
                            "another work directory with a lower optimizer.learning_rate")
        self._checkpoints.save(step, state)
        push(self._workdir)
        self._last_save = time.monotonic()
        self._clock.spend("saving")
        return True


@jax.jit
def all_finite(params: Params) -> Bool[jax.Array, ""]:
    """Whether no parameter is NaN or infinite."""
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
