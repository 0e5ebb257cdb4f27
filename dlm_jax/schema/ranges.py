"""Dataclass fields that know their range: `steps: int = positive()`, `warmup_steps: int = non_negative(0)`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dlm_jax.errors import UserError
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.kinds import FP32_MAX, INT32_MAX

REQUIRED: Any = dataclasses.MISSING
MAX_LENGTH = 2**24  # tokens of a record
MAX_BLOCK = 2**20  # tokens that are denoised together
RANGE = "range"  # the key in a field's metadata


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may take."""

    contains: Callable[[float], bool]
    sentence: str  # what the value must be, such as "must be positive"


def positive(default: Any = REQUIRED) -> Any:
    """A field greater than 0 that int32 can hold, since steps and sizes become int32."""
    return _field(default, Range(lambda x: 0 < x <= INT32_MAX, f"must be positive and at most {INT32_MAX}"))


def positive_fp32(default: Any = REQUIRED) -> Any:
    """A field greater than 0 that fp32 can hold."""
    return _field(default, Range(lambda x: 0 < x <= FP32_MAX, "must be positive and finite in fp32"))


def non_negative(default: Any = REQUIRED) -> Any:
    """A field of at least 0 that int32 can hold."""
    return _field(default, Range(lambda x: 0 <= x <= INT32_MAX, f"must not be negative, nor above {INT32_MAX}"))


def fraction(default: Any = REQUIRED) -> Any:
    """A field in [0, 1)."""
    return _field(default, Range(lambda x: 0 <= x < 1, "must lie in [0, 1)"))


def uint32(default: Any = REQUIRED) -> Any:
    """An unsigned field of 32 bits, such as a seed."""
    return _field(default, Range(lambda x: 0 <= x < 2**32, "must lie between 0 and 2**32 - 1"))


def within(low: float, high: float, default: Any = REQUIRED) -> Any:
    """A field from `low` to `high`."""
    return dataclasses.field(default=default, metadata=between(low, high))


def between(low: float, high: float) -> dict[str, Range]:
    """The metadata of a field from `low` to `high`, for one without a default before others without one:
    `depth: int = dataclasses.field(metadata=between(1, 99))`, which type checkers know to be required."""
    return {RANGE: Range(lambda x: low <= x <= high, f"must lie between {low} and {high}")}


def _field(default: Any, allowed: Range) -> Any:
    return dataclasses.field(default=default, metadata={RANGE: allowed})


def check_ranges(where: str, values: Any) -> None:
    """Raises `UserError` for the first field of the dataclass `values` that lies outside its range; None has none.

    where: what the sentence says before the field's name.
    """
    for field in dataclasses.fields(values):
        allowed, value = field.metadata.get(RANGE), getattr(values, field.name)
        if allowed is not None and value is not None and not allowed.contains(value):
            raise UserError(f"{where}{field.name} {allowed.sentence}, not {shown(value)}; correct it")
