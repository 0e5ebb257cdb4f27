"""Kinds of JSON values, and schemas: tables of the fields of a format and what each may hold."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from dlm_jax.errors import UserError
from dlm_jax.schema.json_text import shown

INT32_MAX = 2**31 - 1
FP32_MAX = (2 - 2**-23) * 2.0**127


@dataclasses.dataclass(frozen=True)
class Kind:
    """A set of JSON values."""

    accepts: Callable[[Any], bool]
    words: str  # what a member of it is, such as "true or false"


Schema = Mapping[str, Kind]

ANY = Kind(lambda x: True, "any value")
FLAG = Kind(lambda x: isinstance(x, bool), "true or false")
TEXT = Kind(lambda x: isinstance(x, str), "text")


def whole(low: int, high: int = INT32_MAX) -> Kind:
    """Integers from `low` to `high`. A boolean is none, and neither is 1.0."""
    return Kind(lambda x: type(x) is int and low <= x <= high, f"a whole number from {low} to {high}")


def real(low: float, high: float = FP32_MAX) -> Kind:
    """Numbers above `low` and up to `high`, written with or without a point."""
    return Kind(lambda x: type(x) in (int, float) and low < x <= high,
                f"a number above {low:g}" + (f" and at most {high:g}" if high < FP32_MAX else " that fp32 can hold"))


def choice(*texts: str) -> Kind:
    """Some texts."""
    return Kind(lambda x: isinstance(x, str) and x in texts, f"one of {', '.join(texts)}")


def list_of(kind: Kind) -> Kind:
    """Arrays of members of a kind."""
    return Kind(lambda x: isinstance(x, list) and all(map(kind.accepts, x)), f"a list, each of it {kind.words}")


def map_of(kind: Kind) -> Kind:
    """Objects with any keys, whose values are members of a kind."""
    return Kind(lambda x: isinstance(x, dict) and all(map(kind.accepts, x.values())),
                f"an object, each value of it {kind.words}")


def either(*kinds: Kind) -> Kind:
    """The union of kinds."""
    return Kind(lambda x: any(kind.accepts(x) for kind in kinds), " or ".join(kind.words for kind in kinds))


def nested(schema: Schema) -> Kind:
    """Objects whose known fields fit a schema."""
    return Kind(lambda x: isinstance(x, dict) and misfit(x, schema) is None, "an object of " + ", ".join(
        f"{name} ({kind.words})" for name, kind in schema.items()))


def misfit(fields: Mapping[str, Any], schema: Schema) -> str | None:
    """The first field whose value is not of its kind, or None. An absent field counts as null, which is of any kind."""
    for name, kind in schema.items():
        if fields.get(name) is not None and not kind.accepts(fields[name]):
            return name
    return None


def check_fields(fields: Mapping[str, Any], schema: Schema, where: str) -> None:
    """Raises `UserError` naming the first field of `where` that does not fit the schema."""
    name = misfit(fields, schema)
    if name is not None:
        raise UserError(f"{where} has {name}: {shown(fields[name])}, which is not {schema[name].words}; correct it")
