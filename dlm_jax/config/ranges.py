"""Config fields that know their range: `steps: int = positive()`, `warmup_steps: int = non_negative(0)`."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dlm_jax.errors import UserError

REQUIRED: Any = dataclasses.MISSING
FP32_MAX = (2 - 2**-23) * 2.0**127
RANGE = "range"  # the key in a field's metadata


@dataclasses.dataclass(frozen=True)
class Range:
    """The values that a number may take."""

    contains: Callable[[float], bool]
    sentence: str  # what the value must be, such as "must be positive"


def positive(default: Any = REQUIRED) -> Any:
    """A field greater than 0."""
    return _field(default, Range(lambda x: x > 0, "must be positive"))


def positive_fp32(default: Any = REQUIRED) -> Any:
    """A field greater than 0 that fp32 can hold."""
    return _field(default, Range(lambda x: 0 < x <= FP32_MAX, "must be positive and finite in fp32"))


def non_negative(default: Any = REQUIRED) -> Any:
    """A field of at least 0."""
    return _field(default, Range(lambda x: x >= 0, "must not be negative"))


def fraction(default: Any = REQUIRED) -> Any:
    """A field in [0, 1)."""
    return _field(default, Range(lambda x: 0 <= x < 1, "must lie in [0, 1)"))


def at_least(minimum: int, default: Any = REQUIRED) -> Any:
    """A field of at least `minimum`."""
    return _field(default, Range(lambda x: x >= minimum, f"must be at least {minimum}"))


def uint32(default: Any = REQUIRED) -> Any:
    """An unsigned field of 32 bits, such as a seed."""
    return _field(default, Range(lambda x: 0 <= x < 2**32, "must lie between 0 and 2**32 - 1"))


def _field(default: Any, allowed: Range) -> Any:
    return dataclasses.field(default=default, metadata={RANGE: allowed})


def check_ranges(group: str, values: Any) -> None:
    """Raises `UserError` for the first field of the dataclass `values` that lies outside its range."""
    for field in dataclasses.fields(values):
        allowed, value = field.metadata.get(RANGE), getattr(values, field.name)
        if allowed is not None and not allowed.contains(value):
            raise UserError(f"config: {group}.{field.name} {allowed.sentence}, not {value}")
