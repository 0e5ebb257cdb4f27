"""JSON objects that are dataclasses: the annotations and ranges of the fields are the schema."""

import dataclasses
import math
import types
import typing
from typing import Any, Literal, TypeVar

from dlm_jax.errors import UserError
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.ranges import check_ranges

T = TypeVar("T")


class Misfit(Exception):
    """A value is not of the type that its field has."""


def from_json(cls: type[T], fields: Any, where: str, **given: Any) -> T:
    """The dataclass `cls` from a JSON object, the inverse of `dataclasses.asdict`, nested dataclasses included.

    Nothing is converted, except that a float may be written without a point, and a tuple is an array. A field with a
    default may be absent, as in files of earlier versions. given: fields that do not come from the object.
    Raises `UserError`, naming the field of `where`, for a field that is unknown, missing, of another type or out of its
    range.
    """
    if not isinstance(fields, dict):
        raise UserError(f"{where} is {shown(fields)} and not an object; copy or write it again")
    known = {field.name: field for field in dataclasses.fields(cls) if field.name not in given}  # type: ignore[arg-type]
    for name in fields:
        if name not in known:
            raise UserError(f"{where} has the field {shown(name)}, which this version of dlm-jax does not know; read "
                            "it with the version that wrote it")
    hints = typing.get_type_hints(cls)
    values = {}
    for name, field in known.items():
        if name in fields:
            values[name] = _field(hints[name], fields[name], where, name)
        elif field.default is dataclasses.MISSING:
            raise UserError(f"{where} does not state {name}; copy or write it again")
    record = cls(**values, **given)
    check_ranges(f"{where}: ", record)
    return record


def _field(kind: Any, value: Any, where: str, name: str) -> Any:
    try:
        return _typed(kind, value, f"{name} of {where}")
    except Misfit:
        raise UserError(f"{where} has {name}: {shown(value)}, which is not {_words(kind)}; correct it") from None


def _typed(kind: Any, value: Any, where: str) -> Any:
    """`value` as a member of the type `kind`. Raises `Misfit` if it is none."""
    arguments = typing.get_args(kind)
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return from_json(kind, value, where)
    if typing.get_origin(kind) is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], each, where) for each in value)
    elif arguments and types.NoneType in arguments:  # such as `int | None`
        return None if value is None else _typed(arguments[0], value, where)
    elif kind is float and type(value) in (int, float) and _finite(value):
        return float(value)
    elif type(value) is kind:
        return value
    raise Misfit


def _finite(value: int | float) -> bool:
    """Whether fp64 can hold the number."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _words(kind: Any) -> str:
    """A type in words."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if typing.get_origin(kind) is tuple:
        return "a list"
    if arguments:
        return f"{_words(arguments[0])} or null"
    return f"of type {kind.__name__}"
