"""The configs that are shipped: each resolves to the values in its golden file."""

import json
from pathlib import Path

import pytest

from dlm_jax.config import load_config, to_json

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = Path(__file__).parent / "golden_configs"


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_resolves_to_its_golden_values(file):
    """To update them on purpose: python tests/test_configs.py"""
    assert json.loads(to_json(load_config(file))) == json.loads((GOLDEN / f"{file.stem}.json").read_text())


def test_every_golden_file_belongs_to_a_config():
    assert {file.stem for file in GOLDEN.glob("*.json")} == {file.stem for file in CONFIGS}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_config_states_how_it_is_run(file):
    assert f"configs/{file.name}" in file.read_text() or "launch/" in file.read_text()


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for file in CONFIGS:
        (GOLDEN / f"{file.stem}.json").write_text(to_json(load_config(file)) + "\n")
