"""What the package declares is what it imports."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dlm_jax

ROOT = Path(__file__).resolve().parents[1]
# Distributions whose name is not that of their module.
DISTRIBUTION = {"orbax": "orbax-checkpoint", "ml_collections": "ml-collections", "PIL": "pillow",
                "tensorflow_datasets": "tensorflow-datasets", "apache_beam": "apache-beam", "yaml": "pyyaml",
                "rouge_score": "rouge-score"}
# Imported where they are asked for.
OPTIONAL = {"torch", "wandb", "apache-beam", "beartype", "lm_eval", "datasets", "tqdm", "rouge-score", "matplotlib",
            "sacrebleu", "sqlitedict", "gguf", "shtab", "starlette", "uvicorn", "pydantic", "prometheus_client",
            "jinja2"}


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
    extras = declared["extras_require"]
    known = names(declared["install_requires"]) | names(extras["test"]) | names(extras["mutants"]) | OPTIONAL
    local = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert imported("tests") - local <= known


def test_the_version_is_stated_in_one_place(declared):
    assert declared["version"] == dlm_jax.__version__


def test_types_the_page_the_base_and_the_font_travel_with_the_package(declared):
    assert {"py.typed", "assets/*.html", "assets/base/*", "assets/font/*"} <= set(declared["package_data"]["dlm_jax"])


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what git holds."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git clone, which says what belongs to the source")
    directory = tmp_path_factory.mktemp("clone")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, directory / name)
    return directory


@pytest.fixture(scope="module")
def sdist(clone, tmp_path_factory):
    """The unpacked source distribution of the clone."""
    directory = tmp_path_factory.mktemp("sdist")
    subprocess.run([sys.executable, "setup.py", "-q", "sdist", "--dist-dir", directory], cwd=clone, check=True,
                   capture_output=True)
    shutil.unpack_archive(next(directory.glob("*.tar.gz")), directory, filter="data")
    return next(path for path in directory.iterdir() if path.is_dir())


@pytest.fixture(scope="module")
def installed(sdist, tmp_path_factory):
    """Runs Python with the wheel of the sdist, installed where no repository is in sight."""
    wheels, target = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("target")
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", wheels, sdist], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", target, *wheels.glob("*.whl")], check=True)

    def python(*arguments):
        done = subprocess.run([sys.executable, *arguments], cwd=target.parent, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(target)})
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert python("-c", "import dlm_jax; print(dlm_jax.__file__)").strip() == str(target / "dlm_jax" / "__init__.py")
    return python


def test_the_source_distribution_is_whole(clone, sdist):
    held = {path.relative_to(clone) for path in clone.rglob("*") if path.is_file() and ".egg-info" not in str(path)}
    assert held <= {path.relative_to(sdist) for path in sdist.rglob("*")}


@pytest.mark.slow
def test_an_installed_package_lists_its_configs_and_loads_each_by_name(installed):
    listed = json.loads(installed("-m", "dlm_jax", "configs", "--json"))
    assert listed.keys() == {file.stem for file in (ROOT / "configs").glob("*.py")}
    installed("-c", f"from dlm_jax.config import load_config\nfor name in {list(listed)}: load_config(name)")
    assert installed("-m", "dlm_jax", "configs", "tiny") == (ROOT / "configs" / "tiny.py").read_text()


@pytest.mark.slow
def test_an_installed_package_holds_what_it_needs_to_sample_and_to_draw(installed, tmp_path):
    page, picture = tmp_path / "page.html", tmp_path / "a.gif"
    text = installed("-m", "dlm_jax", "sample", "bundled", "--prompt", "import", "--max-tokens", "2", "--html", page,
                     "--gif", picture)
    assert text.startswith("import") and page.exists() and picture.exists()
