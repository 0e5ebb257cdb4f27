"""The configs that are shipped: each resolves to the values in its golden file."""

import json
from pathlib import Path

import pytest

from dlm_jax.config import load_config, to_json
from dlm_jax.config.named import config_file, named_configs, purpose_of
from dlm_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = Path(__file__).parent / "golden_configs"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_resolves_to_its_golden_values(file):
    """To update them on purpose: python tests/test_configs.py"""
    assert json.loads(to_json(load_config(file))) == json.loads((GOLDEN / f"{file.stem}.json").read_text())


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_of_the_package_is_found_by_its_name(file):
    assert config_file(file.stem).samefile(file) and load_config(file.stem) == load_config(file)


def test_a_path_is_never_taken_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no config file \./tiny"):
        config_file("./tiny")
    (tmp_path / "tiny").write_text("")
    assert config_file("./tiny").samefile(tmp_path / "tiny") and config_file("tiny").name == "tiny.py"


def test_a_config_says_in_its_first_line_what_it_is_for():
    for name, file in named_configs().items():
        assert purpose_of(file).endswith("."), name


def test_every_golden_file_belongs_to_a_config():
    assert {file.stem for file in GOLDEN.glob("*.json")} == {file.stem for file in CONFIGS}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_states_how_it_is_run(file):
    assert f"--config {file.stem} " in file.read_text() or "launch/" in file.read_text()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file in CONFIGS:
        (GOLDEN / f"{file.stem}.json").write_text(to_json(load_config(file)) + "\n")
