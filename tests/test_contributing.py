"""The examples of CONTRIBUTING.md run, and do what the text states."""

import argparse
import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

import dlm_jax
from dlm_jax.convert import tensor_map
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.diffusion import recipes
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import flatten, weight_table
from dlm_jax.sampling import unmasking

TEXT = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
SECTIONS = dict(part.split("\n", 1) for part in TEXT.split("\n## ")[1:])


@pytest.fixture(autouse=True)
def tables_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples register names in these tables; each test gets copies."""
    for module, name in ((recipes, "RECIPES"), (unmasking, "SCHEDULES"), (unmasking, "SELECTORS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


def run(section: str) -> dict:
    """Executes the Python blocks of a section, one after another; returns their names."""
    names: dict = {"__name__": "example"}
    for code in re.findall(r"```python\n(.*?)```", SECTIONS[section], re.DOTALL):
        exec(compile(code, f"CONTRIBUTING.md, {section}", "exec"), names)
    return names


@pytest.mark.parametrize("section", SECTIONS)
def test_every_example_is_short(section: str) -> None:
    assert len(SECTIONS[section].strip().splitlines()) <= 50


def test_the_recipe_masks_exact_counts_and_its_name_is_known() -> None:
    names = run("Add a recipe")
    assert recipes.recipe("exact_blocks") is names["RECIPES"]["exact_blocks"]


def test_the_schedule_can_be_named_in_an_unmasking_strategy() -> None:
    run("Add a noise schedule")


def test_the_selector_commits_at_most_its_cap_at_each_step() -> None:
    run("Add a selector")
    lm = dlm_jax.load("bundled").with_mask()
    spec = dataclasses.replace(lm.spec, rule="bidirectional", alignment="shifted", eos_token_id=None)
    sample = dataclasses.replace(lm, spec=spec).sample("def f(", max_tokens=16, unmasking="capped:0.01")
    steps = np.array([step for step in sample.commit_step if step])
    assert len(steps) == 16 and 1 <= np.bincount(steps)[1:].max() <= 4 and sample.nfe == steps.max()


def test_the_family_holds_every_weight_once_and_converts_both_ways(random_model) -> None:
    table = run("Add a model family")["phi_table"]()
    config, params = random_model("llama")
    weights, leaves = weight_table(config), flatten(params)
    assert sorted(path for entry in table for path in entry.paths) == sorted(weights)
    for entry in table:
        ours = [leaves[path][0] if entry.stacked else leaves[path] for path in entry.paths]
        theirs = tensor_map.to_hf(entry, ours, weights)
        assert theirs.shape == tensor_map.hf_shape(entry, weights)
        back = tensor_map.from_hf(entry, theirs, weights)
        assert all(np.array_equal(back[path], array) for path, array in zip(entry.paths, ours))


def test_the_export_layout_reads_back_to_the_same_weights(random_model, tmp_path: Path) -> None:
    config, params = random_model("qwen2")
    run("Add an export layout for another engine")["write_bare"](tmp_path, Bundle(config, params, DiffusionSpec()))
    back = read_hf(tmp_path)
    assert back.config == config
    assert jax.tree.all(jax.tree.map(np.array_equal, back.params, params))


def test_the_subcommand_parses_its_flags_and_returns_its_result() -> None:
    names = run("Add a subcommand")
    parser = argparse.ArgumentParser()
    names["add_flags"](parser)
    assert names["run"](parser.parse_args(["bundled"])) == {"parameters": 1_369_728}
