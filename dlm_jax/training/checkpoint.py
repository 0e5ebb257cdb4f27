"""Checkpoints of a run, by Orbax: written in the background; the newest intact one is restored."""

import contextlib
import dataclasses
import errno
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dlm_jax.config import CheckpointConfig
from dlm_jax.errors import UserError
from dlm_jax.parallel.distributed import all_processes, barrier, is_primary
from dlm_jax.runs.checksum import check_arrays, checksums, sealed
from dlm_jax.runs.lock import check_lock
from dlm_jax.runs.read import OtherShape, check_shapes, damage, read_about
from dlm_jax.runs.remote import checkpoints_of

if TYPE_CHECKING:
    from dlm_jax.training.step import TrainState

BESIDE_PARAMS = ("step", "optimizer", "skipped")  # what a checkpoint keeps of a TrainState besides its parameters


class Checkpoints:
    """The checkpoints of a work directory: `checkpoints/<step>` holds `params`, `rest` (step, moments, skipped steps)
    and `about`, a JSON object that describes them and holds their checksums."""

    def __init__(self, workdir: Path, settings: CheckpointConfig, about: dict[str, Any] | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep, keep_period=settings.keep_every or None,
                                               cleanup_tmp_directories=True)
        self._workdir, self.directory = workdir, checkpoints_of(workdir)
        self._manager = ocp.CheckpointManager(self.directory, options=options)
        self._about = about or {}

    def restore(self, fresh: "TrainState", log: Callable[[str], None]) -> "TrainState":
        """The newest intact state on disk, or `fresh`, whose shapes and layouts it takes, if there is none.

        A damaged checkpoint is moved to `damaged/`, beside `checkpoints/`, and reported through `log`. Raises
        `UserError` if all of them are damaged, and if they are of another shape.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step in steps:
            try:
                return self._read(step, fresh)
            except OtherShape:
                raise
            except UserError as error:
                log(f"{error}; falling back to the previous one")
                self._set_aside(step)
        if steps:
            raise UserError(f"all checkpoints of {self.directory.parent} are damaged; start over in a new directory")
        return fresh

    def _read(self, step: int, fresh: "TrainState") -> "TrainState":
        """The state of a step. Raises `UserError` in all processes if one of them finds it damaged."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        with self._damage_anywhere(step):
            sums = read_about(self.directory / str(step))["checksums"]
            check_shapes(self.directory / str(step) / "params", abstract.params)
            saved = self._manager.restore(step, args=ocp.args.Composite(**{
                name: ocp.args.StandardRestore(part) for name, part in _parts(abstract).items()}))
        with self._damage_anywhere(step):
            for name in sums:
                check_arrays(saved[name], sums[name])
        return dataclasses.replace(fresh, params=saved["params"], **saved["rest"])

    @contextlib.contextmanager
    def _damage_anywhere(self, step: int) -> Iterator[None]:
        """`damage` that is raised in all processes if it is found in one, so that all fall back together."""
        problem = None
        try:
            with damage(self.directory / str(step)):
                yield
        except UserError as error:
            problem = error
        if not all_processes(problem is None):
            raise problem or UserError(f"another process finds checkpoint {step} damaged")

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint away, since the run will write a new one for this step."""
        if is_primary():
            damaged = self.directory.parent / "damaged"
            damaged.mkdir(exist_ok=True)
            if (damaged / str(step)).exists():
                (damaged / str(step)).rmtree()
            (self.directory / str(step)).rename(damaged / str(step))
        barrier(f"set aside {step}")
        self._manager.reload()

    def save(self, step: int, state: "TrainState") -> None:
        """Writes `state` in the background, after the previous save has finished.

        Raises `OSError` if that one failed, and `UserError` if another run has taken over the work directory.
        """
        check_lock(self._workdir)
        parts = _parts(state)
        sums = {name: checksums(part) for name, part in parts.items()}
        with _disk_errors(self.directory):
            self._manager.save(step, args=ocp.args.Composite(
                about=ocp.args.JsonSave(sealed({"step": step, **self._about, "checksums": sums})),
                **{name: ocp.args.StandardSave(part) for name, part in parts.items()}))

    def close(self) -> None:
        """Waits until everything is on disk. Raises `OSError` if it cannot be written."""
        with _disk_errors(self.directory):
            self._manager.wait_until_finished()
            self._manager.close()


def _parts(state: "TrainState") -> dict[str, Any]:
    """What is saved of a state, by the name of its directory in the checkpoint."""
    return {"params": state.params, "rest": {name: getattr(state, name) for name in BESIDE_PARAMS}}


@contextlib.contextmanager
def _disk_errors(directory: epath.Path) -> Iterator[None]:
    """TensorStore reports a full disk as a `ValueError`; this raises the `OSError` that it is everywhere else."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        number = int(code[1]) if code else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(directory)) from None
