"""Checkpoints of a run, by Orbax: written in the background, the newest whole one restored."""

import dataclasses
import json
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from dlm_jax.config import CheckpointEvery
from dlm_jax.convert.directories import read_json
from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import map_table
from dlm_jax.training.step import State

MODEL_FILE = "model.json"


class Checkpoints:
    """The checkpoints of a work directory: `checkpoints/<step>` with parameters and optimizer apart."""

    def __init__(self, workdir: Path, settings: CheckpointEvery) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep)
        self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)
        self._every = settings.every

    def restore(self, fresh: State) -> State:
        """The newest state on disk, or `fresh` (whose shapes it must have) where there is none."""
        newest = self._manager.latest_step()
        if newest is None:
            return fresh
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        parts = self._manager.restore(newest, args=ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            rest=ocp.args.StandardRestore({"step": abstract.step, "optimizer": abstract.optimizer})))
        return State(parts["rest"]["step"], parts["params"], parts["rest"]["optimizer"])

    def save(self, step: int, state: State, last: bool) -> None:
        """Writes `state` in the background at every so many steps, and at the last."""
        if (step % self._every == 0 or last) and step not in self._manager.all_steps():
            self._manager.save(step, args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave({"step": state.step, "optimizer": state.optimizer})))

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.wait_until_finished()
        self._manager.close()


def write_model_file(workdir: Path, config: ModelConfig, card: Card) -> None:
    """What the parameters of this work directory are, beside them."""
    fields = {"model": dataclasses.asdict(config), **dataclasses.asdict(card)}
    (workdir / MODEL_FILE).write_text(json.dumps(fields, indent=2) + "\n")


def read_work_directory(workdir: Path) -> Bundle:
    """The model of the newest checkpoint. Raises `UserError` where there is none yet."""
    fields = read_json(workdir / MODEL_FILE)
    config, card = ModelConfig.from_dict(fields.pop("model")), Card.from_dict(fields)
    with ocp.CheckpointManager((workdir / "checkpoints").absolute()) as manager:
        newest = manager.latest_step()
        if newest is None:
            raise UserError(f"{workdir} has no checkpoint yet; let the run reach its first one")
        abstract = map_table(config, lambda _, w: jax.ShapeDtypeStruct(w.shape, "float32"))
        params = manager.restore(newest, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract)))["params"]
    tokenizer = workdir / "tokenizer"
    return Bundle(config, params, card, tokenizer if tokenizer.is_dir() else None)
