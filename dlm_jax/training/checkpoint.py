"""Checkpoints of a run, by Orbax: written in the background, the newest whole one restored."""

import contextlib
import dataclasses
import errno
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dlm_jax.config import CheckpointEvery
from dlm_jax.errors import UserError
from dlm_jax.files import read_json, write_text
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora, join, trained_table
from dlm_jax.models.weights import Params, flatten, unflatten
from dlm_jax.training.step import State
from dlm_jax.training.workdir import checkpoint_steps

MODEL_FILE = "model.json"


class Checkpoints:
    """The checkpoints of a work directory: `checkpoints/<step>` with parameters and optimizer apart."""

    def __init__(self, workdir: Path, settings: CheckpointEvery) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep, cleanup_tmp_directories=True)
        self._directory = (workdir / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def restore(self, fresh: State) -> State:
        """The newest state on disk, or `fresh` (whose shapes it must have) where there is none.

        Raises `UserError` where the newest one is damaged.
        """
        newest = self._manager.latest_step()
        if newest is None:
            return fresh
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        rest = {"step": abstract.step, "optimizer": abstract.optimizer}
        with _damage(self._directory / str(newest)):
            parts = self._manager.restore(newest, args=ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract.params), rest=ocp.args.StandardRestore(rest)))
        return dataclasses.replace(fresh, step=parts["rest"]["step"], params=parts["params"],
                                   optimizer=parts["rest"]["optimizer"])

    def save(self, step: int, state: State) -> None:
        """Writes `state` in the background, once the one before is on disk. Raises `OSError` where that one failed."""
        with _disk_errors(self._directory):
            self._manager.save(step, args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave({"step": state.step, "optimizer": state.optimizer})))

    def close(self) -> None:
        """Waits until everything is on disk. Raises `OSError` where it cannot be."""
        with _disk_errors(self._directory):
            self._manager.wait_until_finished()
            self._manager.close()


def write_model_file(workdir: Path, config: ModelConfig, card: Card, lora: Lora) -> None:
    """What the parameters of this work directory are, beside them."""
    fields = {"model": dataclasses.asdict(config), **dataclasses.asdict(card)}
    if lora.rank:
        fields["lora"] = dataclasses.asdict(lora)
    write_text(workdir / MODEL_FILE, json.dumps(fields, indent=2) + "\n")


def read_work_directory(workdir: Path, base: Params | None = None) -> Bundle:
    """The model of the newest checkpoint; where the run has adapters, those are merged into its `base`.

    Raises `UserError` where there is no checkpoint yet, or where it is damaged.
    """
    bundle, lora = read_trained(workdir)
    if not lora.rank:
        return bundle
    if base is None:
        raise UserError(f"{workdir} holds adapters and lacks the directory of their base; copy the whole directory")
    frozen = {path: w for path, w in flatten(base).items() if path not in flatten(bundle.params)}
    return dataclasses.replace(bundle, params=join(bundle.params, unflatten(frozen), lora))


def read_trained(workdir: Path) -> tuple[Bundle, Lora]:
    """What the newest checkpoint holds, which is the whole model, or its adapters and what was trained beside them; and
    how they were made. Raises `UserError` as `read_work_directory`."""
    fields = read_json(workdir / MODEL_FILE)
    steps = checkpoint_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet; let the run reach its first one")
    config, lora = ModelConfig.from_dict(fields.pop("model")), Lora(**fields.pop("lora", {}))
    card = Card.from_dict(fields)
    table = trained_table(config, lora)
    abstract = unflatten({path: jax.ShapeDtypeStruct(w.shape, "float32") for path, w in table.items()})
    directory = (workdir / "checkpoints" / str(steps[-1])).absolute()
    with _damage(directory), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(directory / "params", abstract)
    tokenizer = workdir / "tokenizer"
    return Bundle(config, params, card, tokenizer if tokenizer.is_dir() else None), lora


@contextlib.contextmanager
def _damage(directory: Path) -> Iterator[None]:
    """What goes wrong while the checkpoint `directory` is read, as one sentence; Orbax has an exception of another type
    for each kind of damage."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"the checkpoint {directory} is damaged ({type(error).__name__}); remove it to use the one "
                        "before it") from error


@contextlib.contextmanager
def _disk_errors(directory: Path) -> Iterator[None]:
    """TensorStore reports a full disk as a `ValueError`; here it is the `OSError` that it is everywhere else."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        number = int(code[1]) if code else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(directory)) from None
