"""Config files: every key is known, typed and consistent, or refused by name."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest

from dlm_jax.config import Config, build, load_config, to_json
from dlm_jax.diffusion.recipes import recipe
from dlm_jax.errors import UserError

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))
FIELDS = {
    "recipe": dataclasses.asdict(recipe("efficient_dlm")),
    "model": {"base": "bundled"},
    "data": {"train": "a", "validation": "b", "seq_length": 128},
    "optimizer": {"learning_rate": 1e-3},
    "train": {"steps": 100, "global_batch_size": 16},
    "checkpoint": {"every": 10},
    "log": {"every": 1},
    "evaluate": {"every": 50},
}


def with_changes(changes: dict) -> dict:
    """FIELDS with changes such as {'train.steps': 3}."""
    fields = copy.deepcopy(FIELDS)
    for key, value in changes.items():
        group, name = key.split(".")
        fields.setdefault(group, {})[name] = value
    return fields


def file_of(tmp_path: Path, body: str) -> Path:
    path = tmp_path / "config.py"
    path.write_text(f"from ml_collections import ConfigDict\ndef get_config():\n    return {body}\n")
    return path


@pytest.fixture
def config_file(tmp_path) -> Path:
    return file_of(tmp_path, f"ConfigDict({FIELDS!r})")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_repository_loads_and_survives_json(path):
    config = load_config(path)
    assert build(Config, json.loads(to_json(config))) == config


def test_defaults_are_filled_in_and_survive_json():
    config = build(Config, FIELDS)
    assert (config.model.mask, config.optimizer.schedule, config.checkpoint.keep) == ("new", "cosine", 2)
    assert build(Config, json.loads(to_json(config))) == config


@pytest.mark.parametrize("group", FIELDS)
def test_an_unknown_key_is_refused_in_every_group(group):
    with pytest.raises(UserError, match=rf"no key '{group}\.color'; the keys here are .*\w"):
        build(Config, with_changes({f"{group}.color": 1}))


def test_an_unknown_group_is_refused():
    with pytest.raises(UserError, match="no key 'trian'"):
        build(Config, with_changes({"trian.steps": 1}))


@pytest.mark.parametrize("key", ["recipe.name", "recipe.streams", "model.base", "data.train", "data.seq_length",
                                 "optimizer.learning_rate", "train.steps", "train.global_batch_size", "log.every"])
def test_a_missing_key_is_refused(key):
    group, name = key.split(".")
    fields = copy.deepcopy(FIELDS)
    del fields[group][name]
    with pytest.raises(UserError, match=f"the key '{key}' is missing"):
        build(Config, fields)


@pytest.mark.parametrize("group", FIELDS)
def test_a_missing_group_is_refused(group):
    with pytest.raises(UserError, match=f"the key '{group}' is missing"):
        build(Config, {name: value for name, value in FIELDS.items() if name != group})


@pytest.mark.parametrize("key, value", [
    ("train.steps", 1.5), ("train.steps", "many"), ("train.steps", True), ("train.steps", None), ("train.steps", "1e3"),
    ("train.steps", "+-5"), ("train.global_batch_size", [16]), ("train.seed", "0x1"),
    ("optimizer.learning_rate", "fast"), ("optimizer.grad_clip_norm", None),
    ("optimizer.learning_rate", float("nan")), ("optimizer.grad_clip_norm", "inf"), ("optimizer.beta1", False),
    ("data.train", None), ("data.train", ["a", "b"]), ("data.validation", {}), ("model.base", True),
    ("recipe.half_life", "long"), ("recipe.block_size", 2.0)])
def test_an_ill_typed_value_is_refused(key, value):
    with pytest.raises(UserError, match=rf"config: {key} must be of type \w+, not "):
        build(Config, with_changes({key: value}))


@pytest.mark.parametrize("key, value", [
    ("model.init", "warm"), ("model.dtype", "float16"), ("model.remat", "all"), ("optimizer.schedule", "linear"),
    ("recipe.streams", 3), ("recipe.streams", True), ("recipe.alignment", "left"), ("recipe.corruption", None)])
def test_a_value_outside_its_choices_is_refused_with_the_choices(key, value):
    with pytest.raises(UserError, match=f"config: {key} must be one of .*, not {value!r}"):
        build(Config, with_changes({key: value}))


@pytest.mark.parametrize("group", FIELDS)
def test_a_value_in_place_of_a_group_is_refused(group):
    with pytest.raises(UserError, match=f"config: {group}. must be a group of keys, not 3"):
        build(Config, copy.deepcopy(FIELDS) | {group: 3})


@pytest.mark.parametrize("named, changes", [
    *((key, {key: 0}) for key in ("train.steps", "train.global_batch_size", "train.grad_accum_steps",
                                  "checkpoint.every", "checkpoint.keep", "log.every", "evaluate.every",
                                  "evaluate.mc_samples", "optimizer.learning_rate", "optimizer.grad_clip_norm")),
    *((key, {key: -1}) for key in ("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.final_lr_ratio",
                                   "optimizer.epsilon", "optimizer.beta1", "optimizer.max_skipped_steps",
                                   "data.validation_records", "train.seed", "checkpoint.keep_every",
                                   "checkpoint.minutes", "log.stall", "evaluate.num_samples")),
    ("optimizer.decay_steps", {"optimizer.schedule": "wsd", "optimizer.decay_steps": -1}),
    ("optimizer.beta2", {"optimizer.beta2": 1}),
    ("train.seed", {"train.seed": 2**32}),
    ("data.seq_length", {"data.seq_length": 1}),
    ("train.grad_accum_steps", {"train.grad_accum_steps": 3}),
    ("optimizer.decay_steps", {"optimizer.decay_steps": 10}),
    ("optimizer.decay_steps", {"optimizer.schedule": "wsd", "optimizer.warmup_steps": 60, "optimizer.decay_steps": 60}),
    ("block_size", {"recipe.block_size": 0}),
    ("anneal_steps", {"recipe.anneal_steps": 5}),
    ("half_life", {"recipe.half_life": 0}),
])
def test_values_that_contradict_are_refused_by_name(named, changes):
    with pytest.raises(UserError, match=named):
        build(Config, with_changes(changes))


def test_a_recipe_name_does_not_claim_what_the_other_keys_deny():
    with pytest.raises(UserError, match="recipe.name is 'mdlm', whose streams is 1, and recipe.streams is 2"):
        build(Config, with_changes({"recipe.name": "mdlm"}))
    assert build(Config, with_changes({"recipe.name": "my own"})).recipe.streams == 2


def test_an_override_names_an_entire_recipe_and_others_change_it(config_file):
    config = load_config(config_file, ["recipe=bd3lm", "recipe.block_size=8"])
    assert config.recipe == dataclasses.replace(recipe("bd3lm"), block_size=8)
    with pytest.raises(UserError, match="no recipe 'bd4lm'"):
        load_config(config_file, ["recipe=bd4lm"])


def test_overrides_are_read_as_the_type_of_their_key(config_file):
    config = load_config(config_file, [
        "train.steps=7", "optimizer.learning_rate=3e-4", "model.base=a=b", "model.mask=811", "recipe.streams=2",
        "optimizer.schedule=constant", "evaluate.mc_samples=4"])
    assert (config.train.steps, config.optimizer.learning_rate, config.model.base) == (7, 3e-4, "a=b")
    assert (config.model.mask, config.recipe.streams, config.optimizer.schedule) == ("811", 2, "constant")
    assert config.evaluate.mc_samples == 4
    assert load_config(config_file) == build(Config, FIELDS)


@pytest.mark.parametrize("override, words", [
    ("train.steps", "not of the form"), ("steps=3", "not of the form"), ("a.b.c=3", "not of the form"),
    ("train=3", "not of the form"), ("train.color=3", "no key 'train.color'"), ("color.x=3", "no key 'color'"),
    ("train.steps=", "train.steps must be of type int"), ("train.steps=-5", "train.steps must be positive"),
    ("model.remat=some", "model.remat must be one of none, save_projections, save_qkv")])
def test_an_override_that_does_not_fit_is_refused(config_file, override, words):
    with pytest.raises(UserError, match=words):
        load_config(config_file, [override])


@pytest.mark.parametrize("body, words", [
    ("{}", "must return an ml_collections.ConfigDict, not dict"), ("1 / 0", "ZeroDivisionError"),
    ("unknown", "NameError"), ("ConfigDict()", "the key 'recipe' is missing")])
def test_a_file_that_gives_no_config_is_refused(tmp_path, body, words):
    with pytest.raises(UserError, match=words):
        load_config(file_of(tmp_path, body))


def test_a_missing_file_or_one_without_a_config_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no config file .*absent\.py"):
        load_config(tmp_path / "absent.py")
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(UserError, match=r"not a config file with a working get_config\(\)"):
        load_config(path)
    path.write_text("def get_config(:\n")
    with pytest.raises(UserError, match="SyntaxError"):
        load_config(path)


@pytest.mark.parametrize("rate", [1e40, "1e39", 0, -1.0])
def test_a_learning_rate_that_fp32_cannot_hold_is_refused(rate):
    with pytest.raises(UserError, match="optimizer.learning_rate must be positive and finite in fp32"):
        build(Config, with_changes({"optimizer.learning_rate": rate}))
