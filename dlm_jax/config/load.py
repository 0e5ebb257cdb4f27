"""Config files -> `Config`.

A config file is Python with a `get_config()` that returns an `ml_collections.ConfigDict`. A key that is unknown,
ill-typed, out of range or in contradiction to another is a `UserError` that names it.
"""

import dataclasses
import json
import math
import re
import runpy
import traceback
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar

from ml_collections import ConfigDict

from dlm_jax.config.fields import Config
from dlm_jax.config.named import config_file
from dlm_jax.diffusion.recipes import recipe
from dlm_jax.errors import UserError

Group = TypeVar("Group")  # a dataclass: the Config or one of its groups


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config of a file, with overrides such as 'train.steps=10' applied.

    path: the file, or the name of a config that comes with the package, such as 'tiny'. Raises `UserError` for a
    file that is no config, and for any key or value that does not fit.
    """
    fields = _run(config_file(path))
    for override in overrides:
        _override(fields, override)
    return build(Config, fields)


def _run(path: Path) -> dict[str, Any]:
    """What `get_config()` of a file returns, as nested dicts."""
    try:
        tree = runpy.run_path(str(path))["get_config"]()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        location = f"line {lines[-1]}, " if lines else ""
        raise UserError(f"{path} is not a config file with a working get_config() ({location}{type(error).__name__}: "
                        f"{error}); fix it, following `dlm configs tiny`") from error
    if not isinstance(tree, ConfigDict):
        raise UserError(f"get_config() of {path} must return an ml_collections.ConfigDict, not {type(tree).__name__}")
    try:
        return tree.to_dict()
    except Exception as error:  # a placeholder without a value
        raise UserError(f"the config of {path} is incomplete: {error}") from error


def _override(fields: dict[str, Any], override: str) -> None:
    """Sets one 'group.key=value', or an entire recipe by 'recipe=NAME'; `build` checks the keys."""
    key, equals, value = override.partition("=")
    if key == "recipe":
        fields[key] = dataclasses.asdict(recipe(value))
        return
    parts = key.split(".")
    if not equals or len(parts) != 2 or not isinstance(fields.get(parts[0], {}), dict):
        raise UserError(f"'{override}' is not of the form group.key=value, such as train.steps=100")
    fields.setdefault(parts[0], {})[parts[1]] = value


def build(cls: type[Group], fields: object, where: str = "") -> Group:
    """A (nested) dataclass from a dict; strings are converted to the field's type. Raises `UserError` with the key."""
    if not isinstance(fields, dict):
        raise UserError(f"config: {where or 'the config'} must be a group of keys, not {fields!r}")
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in fields:
        if key not in known:
            raise UserError(f"config: there is no key '{where}{key}'; the keys here are {', '.join(known)}")
    missing = [name for name, f in known.items() if name not in fields and f.default is dataclasses.MISSING]
    if missing:
        raise UserError(f"config: the key '{where}{missing[0]}' is missing")
    types = typing.get_type_hints(cls)
    return cls(**{key: _value(types[key], value, f"{where}{key}") for key, value in fields.items()})


def _value(kind: Any, value: object, key: str) -> Any:
    """`value` as the type `kind` of a field: a dataclass, a Literal, or bool, int, float or str."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return build(kind, value, f"{key}.")
    if typing.get_origin(kind) is Literal:
        return _choice(typing.get_args(kind), value, key)
    if kind is bool:
        if str(value) not in ("True", "False", "true", "false"):
            raise UserError(f"config: {key} must be true or false, not {value!r}")
        return str(value).lower() == "true"
    if isinstance(value, bool) or not _converts(kind, value):
        raise UserError(f"config: {key} must be of type {kind.__name__}, not {value!r}")
    return kind(value)


def _choice(allowed: tuple[Any, ...], value: object, key: str) -> Any:
    for choice in allowed:
        if str(value) == str(choice):
            return choice
    raise UserError(f"config: {key} must be one of {', '.join(map(str, allowed))}, not {value!r}")


def _converts(kind: type, value: Any) -> bool:
    """Whether a value is, or spells, one of this type: no 1.5 for an int, no infinity for a float."""
    if kind is str:
        return isinstance(value, str | int | Path)  # an int: the id of a mask token
    if kind is int:
        return isinstance(value, int) or (isinstance(value, str) and bool(re.fullmatch(r"\s*[+-]?\d{1,20}\s*", value)))
    try:
        return math.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def to_json(config: Config) -> str:
    """The full config as JSON, the inverse of `build(Config, json.loads(text))`."""
    return json.dumps(dataclasses.asdict(config), indent=2)
