"""What the package declares is what it imports."""

import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

import dlm_jax

ROOT = Path(__file__).resolve().parents[1]
# Distributions whose name is not that of their module.
DISTRIBUTION = {"orbax": "orbax-checkpoint", "ml_collections": "ml-collections", "PIL": "pillow",
                "tensorflow_datasets": "tensorflow-datasets", "apache_beam": "apache-beam", "yaml": "pyyaml"}
OPTIONAL = {"torch", "wandb", "apache-beam", "beartype"}  # imported where they are asked for


@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    """The keywords that setup.py passes to setuptools."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("setuptools.setup", lambda **keywords: found.update(keywords))
        runpy.run_path(str(ROOT / "setup.py"))
    return found


def imported(folder: str) -> set[str]:
    """The distributions that the files of a folder import."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            found |= {name.split(".")[0] for name in names}
    return {DISTRIBUTION.get(name, name) for name in found - set(sys.stdlib_module_names) - {"dlm_jax"}}


def names(requirements: list[str]) -> set[str]:
    """The distributions that a list of requirements names."""
    return {re.match(r"[\w-]+", requirement)[0] for requirement in requirements}


def test_the_package_requires_what_it_imports_and_nothing_else(declared):
    assert imported("dlm_jax") - OPTIONAL == names(declared["install_requires"])


def test_what_is_optional_is_an_extra(declared):
    extras = set().union(*map(names, declared["extras_require"].values()))
    assert imported("dlm_jax") & OPTIONAL <= extras


def test_the_tests_require_what_they_import(declared):
    known = names(declared["install_requires"]) | names(declared["extras_require"]["test"]) | OPTIONAL
    local = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert imported("tests") - local <= known


def test_the_version_is_stated_in_one_place(declared):
    assert declared["version"] == dlm_jax.__version__


def test_types_configs_and_the_base_travel_with_the_package(declared):
    assert {"py.typed", "assets/*.py", "assets/base/*"} <= set(declared["package_data"]["dlm_jax"])
