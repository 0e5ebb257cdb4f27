"""JSON is read strictly, and a number, a flag and a text are told apart."""

import dataclasses
import json
import os

import pytest

from dlm_jax.errors import UserError
from dlm_jax.schema.json_text import MAX_DEPTH, parse_json, read_regular
from dlm_jax.schema.kinds import FLAG, TEXT, check_fields, either, list_of, map_of, nested, real, whole
from dlm_jax.schema.ranges import within
from dlm_jax.schema.record import from_json


@pytest.mark.parametrize("value", [None, True, 0, -1, 2**70, 1.5, 1e300, "", "ü\U0001f600\x00", [], [{"a": [None]}]])
def test_what_json_spells_is_read_back(value):
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@pytest.mark.parametrize("data, words", [
    (b"", "Expecting value"), (b"{} {}", "Extra data"), (b"NaN", "NaN is not a number"),
    (b"[-Infinity]", "-Infinity is not a number"), (b"1e999", "too large"), (b"9" * 5000, "4300 digits"),
    (b'{"a": 1, "b": {"c": 1, "c": 1}}', "the key 'c' twice"), (b'"\xff"', "byte 1 is not UTF-8"),
    (b'"\\ud800"', "half a surrogate"), (b'{"\\udfff": 1}', "half a surrogate"), ("1".encode("utf-16"), "not UTF-8"),
    (b"[" * 66 + b"]" * 66, f"deeper than {MAX_DEPTH}"), (b"[" * 10**6, f"deeper than {MAX_DEPTH}"),
    (b'{"a":' * 10**5 + b"1" + b"}" * 10**5, f"deeper than {MAX_DEPTH}"),
    (b'"' + b"x" * 99 + b'"', "more than 99 bytes")])
def test_what_parsers_disagree_about_is_refused(data, words):
    with pytest.raises(ValueError, match=words):
        parse_json(data, 99 if len(data) == 101 else 2**30)


def test_only_regular_files_of_bounded_size_are_read(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 10)
    os.mkfifo(tmp_path / "pipe")
    assert read_regular(tmp_path / "file", 10) == b"x" * 10
    for name, words in (("file", "more than 9 bytes"), ("pipe", "not a regular file"), (".", "not a regular file")):
        with pytest.raises(UserError, match=words):
            read_regular(tmp_path / name, 9)
    with pytest.raises(UserError, match="not a regular file"):
        read_regular("/dev/zero", 9)


@pytest.mark.parametrize("kind, inside, outside", [
    (FLAG, [True, False], [0, 1, "true", "false", []]),
    (TEXT, ["", "x"], [1, ["x"], {}]),
    (whole(1, 9), [1, 9], [True, 0, 10, 1.0, "1", 10**400]),
    (real(0, 1), [1, 0.5, 1e-300], [True, 0, 1.5, float("nan"), float("inf"), "0.5", 10**400]),
    (list_of(TEXT), [[], ["x"]], ["x", [1], {}]),
    (map_of(whole(0)), [{}, {"a": 0}], [[], {"a": -1}]),
    (either(FLAG, TEXT), [True, "x"], [1]),
    (nested({"a": FLAG}), [{}, {"a": True, "b": 1}, {"a": None}], [[], {"a": 1}])])
def test_a_kind_holds_its_values_and_no_other(kind, inside, outside):
    for value in inside:
        check_fields({"x": value}, {"x": kind}, "it")
    for value in outside:
        with pytest.raises(UserError, match="it has x: .*, which is not .*; correct it"):
            check_fields({"x": value}, {"x": kind}, "it")


@dataclasses.dataclass(frozen=True)
class Leg:
    length: float


@dataclasses.dataclass(frozen=True)
class Animal:
    name: str
    legs: tuple[Leg, ...]
    age: int | None = within(0, 200, None)
    tame: bool = False


FIELDS = {"name": "cat", "legs": [{"length": 0.5}, {"length": 1}], "age": 3, "tame": True}


def test_a_record_is_the_inverse_of_asdict():
    animal = from_json(Animal, FIELDS, "it")
    assert animal == Animal("cat", (Leg(0.5), Leg(1.0)), 3, True) and type(animal.legs[1].length) is float
    assert from_json(Animal, json.loads(json.dumps(dataclasses.asdict(animal))), "it") == animal


@pytest.mark.parametrize("change, words", [
    ({"name": 1}, "it has name: 1, which is not of type str"), ({"tame": "false"}, "tame: 'false'"),
    ({"tame": 1}, "tame: 1"), ({"age": True}, "age: True"),
    ({"age": 1.0}, "age: 1.0, which is not of type int or null"),
    ({"age": 300}, "it: age must lie between 0 and 200, not 300"), ({"wings": 2}, "the field 'wings'"),
    ({"legs": {}}, "legs: {}, which is not a list"), ({"legs": [1]}, "legs of it is 1 and not an object"),
    ({"legs": [{"length": 10**400}]}, "legs of it has length: 1000"), ({"legs": [{}]}, "does not state length")])
def test_a_record_is_refused_by_the_name_of_its_field(change, words):
    with pytest.raises(UserError, match=words):
        from_json(Animal, FIELDS | change, "it")
