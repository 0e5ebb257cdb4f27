"""Checkpoints of a run, by Orbax: written in the background, the newest whole one restored."""

import contextlib
import dataclasses
import errno
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dlm_jax.cluster import everywhere, leads, meet
from dlm_jax.config import CheckpointEvery
from dlm_jax.errors import UserError
from dlm_jax.files import read_json, write_text
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import map_table
from dlm_jax.training.remote import checkpoints_of
from dlm_jax.training.step import State
from dlm_jax.training.workdir import checkpoint_steps

MODEL_FILE = "model.json"
REST = ("step", "optimizer", "skipped")  # what a State has beside its parameters


class Checkpoints:
    """The checkpoints of a work directory: `checkpoints/<step>` with parameters, the rest of the state, and `about`,
    which says what they are."""

    def __init__(self, workdir: Path, settings: CheckpointEvery, about: dict[str, Any] | None = None) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=settings.keep, keep_period=settings.keep_every or None,
                                               cleanup_tmp_directories=True)
        self._directory = checkpoints_of(workdir)
        self._manager = ocp.CheckpointManager(self._directory, options=options)
        self._about = about or {}

    def restore(self, fresh: State, say: Callable[[str], None]) -> State:
        """The newest state on disk that is whole, or `fresh` (whose shapes it must have) where there is none.

        A damaged one is moved to `damaged` beside `checkpoints`, and `say` told. Raises `UserError` where all are.
        """
        steps, problem = sorted(self._manager.all_steps(), reverse=True), None
        for step in steps:
            state, problem = self._try(step, fresh)
            if everywhere(state is not None):
                return state
            say(f"{problem or f'another process finds checkpoint {step} damaged'}; going on from the one before it")
            self._set_aside(step)
        if problem:
            raise UserError(f"all checkpoints of {self._directory.parent} are damaged; start anew in another directory")
        return fresh

    def _try(self, step: int, fresh: State) -> tuple[Any, str]:
        """The state of a step, or what is wrong with it."""
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, fresh)
        rest = {name: getattr(abstract, name) for name in REST}
        try:
            with damage(self._directory / str(step)):
                parts = self._manager.restore(step, args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params), rest=ocp.args.StandardRestore(rest)))
        except UserError as error:
            return None, str(error)
        return State(params=parts["params"], **parts["rest"]), ""

    def _set_aside(self, step: int) -> None:
        """Moves a damaged checkpoint out of the way of the one that the run will write for this step."""
        if leads():
            kept = self._directory.parent / "damaged"
            kept.mkdir(exist_ok=True)
            if (kept / str(step)).exists():
                (kept / str(step)).rmtree()
            (self._directory / str(step)).rename(kept / str(step))
        meet(f"set aside {step}")
        self._manager.reload()

    def save(self, step: int, state: State) -> None:
        """Writes `state` in the background, once the one before is on disk. Raises `OSError` where that one failed."""
        with _disk_errors(self._directory):
            self._manager.save(step, args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                rest=ocp.args.StandardSave({name: getattr(state, name) for name in REST}),
                about=ocp.args.JsonSave({"step": step, **self._about})))

    def close(self) -> None:
        """Waits until everything is on disk. Raises `OSError` where it cannot be."""
        with _disk_errors(self._directory):
            self._manager.wait_until_finished()
            self._manager.close()


def write_model_file(workdir: Path, config: ModelConfig, card: Card) -> None:
    """What the parameters of this work directory are, beside them."""
    write_text(workdir / MODEL_FILE, json.dumps(model_fields(config, card), indent=2) + "\n")


def model_fields(config: ModelConfig, card: Card) -> dict[str, Any]:
    """What parameters are, for JSON."""
    return {"model": dataclasses.asdict(config), **dataclasses.asdict(card)}


def read_work_directory(workdir: Path) -> Bundle:
    """The model of the newest checkpoint. Raises `UserError` where there is none yet, or where it is damaged."""
    fields = read_json(workdir / MODEL_FILE)
    steps = checkpoint_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet; let the run reach its first one")
    config, card = ModelConfig.from_dict(fields.pop("model")), Card.from_dict(fields)
    abstract = map_table(config, lambda _, w: jax.ShapeDtypeStruct(w.shape, "float32"))
    directory = checkpoints_of(workdir) / str(steps[-1])
    with damage(directory, "remove it to use the one before it"), ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(directory / "params", abstract)
    tokenizer = workdir / "tokenizer"
    return Bundle(config, params, card, tokenizer if tokenizer.is_dir() else None)


@contextlib.contextmanager
def damage(directory: Any, mend: str = "") -> Iterator[None]:
    """What goes wrong while the checkpoint `directory` is read, as one sentence with its mend; Orbax has an exception
    of another type for each kind of damage."""
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise
    except Exception as error:
        raise UserError(f"the checkpoint {directory} is damaged ({type(error).__name__})"
                        f"{'; ' * bool(mend)}{mend}") from error


@contextlib.contextmanager
def _disk_errors(directory: Any) -> Iterator[None]:
    """TensorStore reports a full disk as a `ValueError`; here it is the `OSError` that it is everywhere else."""
    try:
        yield
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        number = int(code[1]) if code else errno.ENOSPC
        raise OSError(number, os.strerror(number), str(directory)) from None
