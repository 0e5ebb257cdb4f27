"""The model in a work directory: a description of its parameters, and the parameters of its newest checkpoint.

Reading needs Orbax, but neither the optimizer nor the training step.
"""

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from dlm_jax.errors import UserError
from dlm_jax.files import write_text
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.lora import Lora, merge_trained, trained_table
from dlm_jax.models.weights import Params, flatten, unflatten
from dlm_jax.runs.checksum import Damage, check_arrays, unsealed
from dlm_jax.runs.remote import checkpoints_of
from dlm_jax.runs.workdir import checkpoint_steps
from dlm_jax.schema.json_text import MAX_LINE, parse_json
from dlm_jax.schema.record import from_json

MODEL_FILE = "model.json"


def write_model_file(workdir: Path, config: ModelConfig, spec: DiffusionSpec, lora: Lora) -> None:
    """Writes `model.json`: what the parameters of this work directory are, for whoever looks at it. Each checkpoint
    also says it, and that is what is read."""
    write_text(workdir / MODEL_FILE, json.dumps(model_fields(config, spec, lora), indent=2) + "\n")


def model_fields(config: ModelConfig, spec: DiffusionSpec, lora: Lora) -> dict[str, Any]:
    """What the parameters are, as JSON: architecture, diffusion spec and, where there are any, adapters."""
    adapters = {"lora": dataclasses.asdict(lora)} if lora.rank else {}
    return {"model": dataclasses.asdict(config), **dataclasses.asdict(spec), **adapters}


def read_work_directory(workdir: Path, base: Params | None = None) -> Bundle:
    """The model of the newest checkpoint, in fp32. If the run trained adapters, they are merged into its `base`.

    Raises `UserError` if there is no checkpoint yet, if it is damaged, or if a run with adapters lacks its base.
    """
    bundle, lora = read_trained(workdir)
    if not lora.rank:
        return bundle
    if base is None:
        raise UserError(f"{workdir} holds adapters but not the base model they were trained on; copy the entire "
                        "directory")
    trained = flatten(bundle.params)
    # In fp32, as training has held them: with parts in another dtype the model would compute in that.
    frozen = {path: np.asarray(weight, np.float32) for path, weight in flatten(base).items() if path not in trained}
    return dataclasses.replace(bundle, params=merge_trained(bundle.params, unflatten(frozen), lora))


def read_trained(workdir: Path) -> tuple[Bundle, Lora]:
    """What the newest checkpoint holds, and the adapter settings of the run.

    The parameters, fp32, are the full model's (`lora.rank` 0), or the adapters and the weights trained beside them.
    Raises `UserError` if there is no checkpoint yet or if it is damaged.
    """
    steps = checkpoint_steps(workdir)
    if not steps:
        raise UserError(f"{workdir} has no checkpoint yet; let the run reach its first one")
    directory = checkpoints_of(workdir) / str(steps[-1])
    with (damage(directory, fix="remove it to use the previous one"), without_notice(),
          ocp.StandardCheckpointer() as checkpointer):
        about = read_about(directory)
        fields = about["model"]
        config = ModelConfig.from_dict(fields.pop("model"))
        lora = from_json(Lora, fields.pop("lora", {}), "the description of the adapters")
        spec, table = DiffusionSpec.from_dict(fields), trained_table(config, lora)
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])  # however the run has sharded them
        abstract = unflatten({path: jax.ShapeDtypeStruct(w.shape, "float32", sharding=here)
                              for path, w in table.items()})
        check_shapes(directory / "params", abstract)
        params = checkpointer.restore(directory / "params", abstract)
        check_arrays(params, about["checksums"]["params"])
    tokenizer = workdir / "tokenizer"
    return Bundle(config, params, spec, tokenizer if tokenizer.is_dir() else None), lora


def validation_nelbo(workdir: Path) -> float | None:
    """The validation NELBO of the newest checkpoint, nats per token; None if the run did not log it at that step."""
    file, steps = workdir / "validation.jsonl", checkpoint_steps(workdir)
    for line in reversed(file.read_bytes().splitlines() if file.is_file() else []):
        with contextlib.suppress(ValueError):
            record = parse_json(line, MAX_LINE)
            if isinstance(record, dict) and [record.get("step")] == steps[-1:] and type(record.get("nelbo")) is float:
                return record["nelbo"]
    return None


def read_about(directory: epath.Path) -> dict[str, Any]:
    """What the checkpoint `directory` says about itself. Raises `Damage` if that is not what was written."""
    return unsealed((directory / "about" / "metadata").read_text())


class OtherShape(UserError):
    """A checkpoint of another model: intact, but not of the shape that is wanted."""


def check_shapes(directory: epath.Path, wanted: Params) -> None:
    """Raises `OtherShape` for the first array in the checkpoint item `directory` whose shape is not as `wanted`."""
    with ocp.StandardCheckpointer() as checkpointer:
        tree: Any = checkpointer.metadata(directory).item_metadata
    found = {jax.tree_util.keystr(path): tuple(x.shape) for path, x in jax.tree_util.tree_leaves_with_path(tree.tree)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted):
        name = jax.tree_util.keystr(path)
        if name in found and found[name] != leaf.shape:
            raise OtherShape(f"{name} in {directory} has the shape {list(found[name])} and the model wants "
                             f"{list(leaf.shape)}; name the base that the run began with, or another work directory")


@contextlib.contextmanager
def damage(directory: epath.Path, fix: str = "") -> Iterator[None]:
    """Turns whatever goes wrong while the checkpoint `directory` is read into one `UserError`, with how to `fix` it.

    Orbax raises an exception of a different type for every kind of damage.
    """
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError, OtherShape):
        raise
    except Exception as error:
        advice = f"; {fix}" if fix else ""
        cause = error if isinstance(error, Damage) else type(error).__name__
        raise UserError(f"the checkpoint {directory} is damaged ({cause}){advice}") from error


@contextlib.contextmanager
def without_notice() -> Iterator[None]:
    """Keeps Orbax from saying that a part of a checkpoint, read by itself, has no metadata of its own."""
    logger = logging.getLogger("absl")

    def other(record: logging.LogRecord) -> bool:
        return "Metadata file does not exist" not in record.getMessage()

    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)
