"""JSON from outside, parsed strictly: bounded in size and depth, UTF-8, and nothing that readers disagree about."""

import json
import math
import os
import stat
from pathlib import Path
from typing import Any, NoReturn

from dlm_jax.errors import UserError

MAX_FILE = 2**28  # bytes; the largest tokenizer.json in use has 2**25
MAX_LINE = 2**24  # bytes of a line in a file of JSON lines
MAX_DEPTH = 64  # objects and arrays inside one another


def parse_json(data: bytes, limit: int = MAX_FILE) -> Any:
    """The value that `data` spells. Raises `ValueError`, with the cause, for anything that is not strictly JSON.

    Refused: more than `limit` bytes, nesting beyond MAX_DEPTH, text that is not UTF-8, half surrogate pairs, NaN,
    Infinity and numbers that overflow to it, and objects with two values for one key, of which parsers choose either.
    """
    if len(data) > limit:
        raise ValueError(f"it has more than {limit} bytes")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start} is not UTF-8") from None
    try:
        value = json.loads(text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_not_finite)
    except RecursionError:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH}") from None
    _check_tree(value)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the key {ascii(twice[:80])} twice")
    return fields


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:20]} is too large")
    return value


def _not_finite(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number in JSON")


def _check_tree(value: Any) -> None:
    """Raises `ValueError` for a value that is nested too deeply, and for half a surrogate pair in a text or a key."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        texts = [each for each in level if isinstance(each, str)]
        parents = [each for each in level if isinstance(each, dict | list)]
        keys = [key for each in parents if isinstance(each, dict) for key in each]
        try:
            "".join(texts + keys).encode()
        except UnicodeEncodeError:
            raise ValueError("it holds half a surrogate pair, which is not text") from None
        level = [child for each in parents for child in (each.values() if isinstance(each, dict) else each)]
        if not level:
            return
    raise ValueError(f"it is nested deeper than {MAX_DEPTH}")


def check_regular(path: str | Path) -> None:
    """Raises `UserError` for what is not a file on a disk: a pipe would never end, and opening a device may act on it.

    Raises `OSError` if there is nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise UserError(f"{path} is not a regular file; replace it by one, or remove it")


def read_regular(path: str | Path, limit: int = MAX_FILE) -> bytes:
    """The bytes of a regular file. Raises `UserError` for anything else and for more than `limit` bytes, and `OSError`
    where it cannot be read."""
    check_regular(path)
    with open(path, "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UserError(f"{path} has more than {limit} bytes, which no file of its kind has; restore it")
    return data


def shown(value: object) -> str:
    """A value from outside, on one line and not longer than a sentence can hold."""
    try:
        text = repr(value)
    except ValueError:  # Python does not spell integers of more than 4300 digits
        text = "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."
