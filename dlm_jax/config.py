"""Config files -> frozen dataclasses.

A config file is Python with a `get_config()` that returns an `ml_collections.ConfigDict`. Here each of its keys is
known, typed and explained; an unknown, ill-typed or contradictory one is an error with a sentence.
"""

import dataclasses
import json
import math
import runpy
import traceback
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import RECIPES, Recipe, recipe
from dlm_jax.errors import UserError

Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """base: a native, work or Hugging Face directory, a hub id, or 'bundled' for the model the package carries.
    init: 'base' starts from its weights, 'scratch' from random ones of its shape.
    mask: 'new' adds a mask token (a row at the mean of the others); a token or an id reuses that row.
    dtype: of the computation; the master weights are always float32.
    remat: what the backward pass makes again instead of keeping: 'none', 'dots' (keeps matrix products), 'full'.
    """

    base: str
    init: Literal["base", "scratch"] = "base"
    mask: str = "new"
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"


@dataclasses.dataclass(frozen=True)
class Data:
    """train, validation: a directory made by `dlm prepare`, a text file, or 'python-stdlib' for the sources of the
    running Python's standard library. train may also be a mixture of such, PATH:WEIGHT,PATH:WEIGHT. length: tokens of a
    record where `train` is text; a prepared directory has its own, and text for validation is cut like the training
    records. validation_records: how many records the validation loss reads (0: all)."""

    train: str
    validation: str
    length: int
    validation_records: int = 0


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW. schedule: after `warmup` steps of linear growth 'constant' stays, 'cosine' falls to `final` times the peak
    at the last step, 'wsd' stays and falls linearly in the last `decay` steps. clip: largest global gradient norm.
    skip: a step whose loss or gradient is no finite number changes nothing; after more than so many in a row the run
    ends."""

    learning_rate: float
    schedule: Literal["constant", "cosine", "wsd"] = "cosine"
    warmup: int = 0
    decay: int = 0
    final: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    skip: int = 5


@dataclasses.dataclass(frozen=True)
class Train:
    """steps: optimizer steps; batch: records a step; accumulate: parts that the batch is cut into, one after the other;
    seed: decides initial weights, data order and noise."""

    steps: int
    batch: int
    accumulate: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """How the devices share the work; -1 is what is left. replica: copies of the model, each with a part of the batch
    (across slices and hosts with slow links); fsdp: shares of the parameters, and of the batch; tensor: shares of heads
    and mlp, for batches smaller than the number of devices. One device is no mesh."""

    replica: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Every:
    """every: steps between two; the last step always counts."""

    every: int


@dataclasses.dataclass(frozen=True)
class CheckpointEvery(Every):
    """keep: how many checkpoints stay on disk, the newest; keep_every: those of every so many steps stay too (0: none);
    minutes: also save when so many have passed since the last one, at the next logged step (0: never)."""

    keep: int = 2
    keep_every: int = 0
    minutes: float = 0.0


@dataclasses.dataclass(frozen=True)
class LogEvery(Every):
    """stall: seconds without a step after which the stacks of all threads are shown (0: never); wandb: the Weights &
    Biases project that gets the same numbers, or nothing."""

    stall: float = 1800.0
    wandb: str = ""


@dataclasses.dataclass(frozen=True)
class EvaluateEvery(Every):
    """samples: levels drawn for each validation record; texts: how many unconditional samples to write to
    samples.jsonl."""

    samples: int = 1
    texts: int = 0


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides a training run."""

    recipe: Recipe
    model: ModelChoice
    data: Data
    optimizer: Optimizer
    train: Train
    checkpoint: CheckpointEvery
    log: LogEvery
    evaluate: EvaluateEvery
    mesh: MeshShape = MeshShape()

    def __post_init__(self) -> None:
        positive = {
            "train.steps": self.train.steps, "train.batch": self.train.batch, "train.accumulate": self.train.accumulate,
            "checkpoint.every": self.checkpoint.every, "checkpoint.keep": self.checkpoint.keep,
            "log.every": self.log.every, "evaluate.every": self.evaluate.every,
            "evaluate.samples": self.evaluate.samples, "optimizer.learning_rate": self.optimizer.learning_rate,
            "optimizer.clip": self.optimizer.clip,
        }
        not_negative = {
            "data.validation_records": self.data.validation_records, "optimizer.warmup": self.optimizer.warmup,
            "optimizer.decay": self.optimizer.decay, "optimizer.final": self.optimizer.final,
            "optimizer.epsilon": self.optimizer.epsilon, "optimizer.weight_decay": self.optimizer.weight_decay,
            "optimizer.skip": self.optimizer.skip, "checkpoint.keep_every": self.checkpoint.keep_every,
            "checkpoint.minutes": self.checkpoint.minutes, "log.stall": self.log.stall,
            "evaluate.texts": self.evaluate.texts,
        }
        for key, value in positive.items():
            if value <= 0:
                raise UserError(f"config: {key} must be positive, not {value}")
        for key, value in not_negative.items():
            if value < 0:
                raise UserError(f"config: {key} must not be negative, not {value}")
        for key, value in {"beta1": self.optimizer.beta1, "beta2": self.optimizer.beta2}.items():
            if not 0 <= value < 1:
                raise UserError(f"config: optimizer.{key} must lie in [0, 1), not {value}")
        if not 0 <= self.train.seed < 2**32:
            raise UserError(f"config: train.seed must lie between 0 and 2**32 - 1, not {self.train.seed}")
        self._check_recipe_name()
        if self.data.length < 2:
            raise UserError(f"config: data.length must be at least 2, not {self.data.length}")
        if self.train.batch % self.train.accumulate:
            raise UserError(f"config: train.batch {self.train.batch} cannot be cut into train.accumulate "
                            f"{self.train.accumulate} equal parts")
        if self.optimizer.schedule != "wsd" and self.optimizer.decay:
            raise UserError(f"config: optimizer.decay is for the schedule 'wsd', not '{self.optimizer.schedule}'")
        if self.optimizer.decay and self.optimizer.warmup + self.optimizer.decay > self.train.steps:
            raise UserError(f"config: optimizer.warmup {self.optimizer.warmup} and optimizer.decay "
                            f"{self.optimizer.decay} do not fit into train.steps {self.train.steps}")

    def _check_recipe_name(self) -> None:
        """A name alone changes nothing, and must not claim what the other keys do not say."""
        known = RECIPES.get(self.recipe.name, self.recipe)
        for key in ("streams", "alignment", "corruption"):
            ours, named = getattr(self.recipe, key), getattr(known, key)
            if ours != named:
                raise UserError(f"config: recipe.name is '{known.name}', whose {key} is {named!r}, and recipe.{key} is "
                                f"{ours!r}; change both or give the recipe another name")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a file, with overrides such as 'train.steps=10' applied.

    Raises `UserError` for a file that is not such a config, and for any key or value that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no config file {path}")
    try:
        tree = runpy.run_path(str(path))["get_config"]()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f"line {lines[-1]}, " if lines else ""
        raise UserError(f"{path} is not a config file with a working get_config() ({place}{type(error).__name__}: "
                        f"{error}); mend it after the example of configs/tiny.py") from error
    if not isinstance(tree, ConfigDict):
        raise UserError(f"get_config() of {path} must return an ml_collections.ConfigDict, not {type(tree).__name__}")
    try:
        fields = tree.to_dict()
    except Exception as error:  # a placeholder that was never given a value
        raise UserError(f"the config of {path} is not complete: {error}") from error
    for override in overrides:
        _override(fields, override)
    return build(Config, fields)


def _override(fields: dict, override: str) -> None:
    """Sets one 'a.b=value', or the whole of a named recipe by 'recipe=NAME'; `build` checks the keys."""
    key, equals, value = override.partition("=")
    if key == "recipe":
        fields[key] = dataclasses.asdict(recipe(value))
        return
    parts = key.split(".")
    if not equals or len(parts) != 2 or not isinstance(fields.get(parts[0], {}), dict):
        raise UserError(f"'{override}' is not of the form group.key=value, such as train.steps=100")
    fields.setdefault(parts[0], {})[parts[1]] = value


def build(cls: type, fields: Any, where: str = "") -> Any:
    """A (nested) dataclass from a dict; strings are read as the field's type. Raises `UserError` with the key."""
    if not isinstance(fields, dict):
        raise UserError(f"config: {where or 'the config'} must be a group of keys, not {fields!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}
    for key in fields:
        if key not in known:
            raise UserError(f"config: there is no key '{where}{key}'; the keys here are {', '.join(known)}")
    missing = [name for name, f in known.items() if name not in fields and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"config: the key '{where}{missing[0]}' is missing")
    types = typing.get_type_hints(cls)
    return cls(**{key: _value(types[key], value, f"{where}{key}") for key, value in fields.items()})


def _value(kind: Any, value: Any, key: str) -> Any:
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return build(kind, value, f"{key}.")
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        for choice in allowed:
            if str(value) == str(choice):
                return choice
        raise UserError(f"config: {key} must be one of {', '.join(map(str, allowed))}, not {value!r}")
    try:
        converted = kind(value)
    except (TypeError, ValueError):
        converted = None
    fits = {int: _is_whole(value), float: isinstance(converted, float) and math.isfinite(converted),
            str: isinstance(value, str | int | Path)}  # an int: the id of a mask token
    if converted is None or isinstance(value, bool) or not fits[kind]:
        raise UserError(f"config: {key} must be of type {kind.__name__}, not {value!r}")
    return converted


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdecimal())


def to_json(config: Config) -> str:
    """The whole config as JSON, the inverse of `build(Config, json.loads(text))`."""
    return json.dumps(dataclasses.asdict(config), indent=2)
