"""The house: which room may import which, what is never imported, and how fast the front door opens."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dlm_jax

ROOT = Path(dlm_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# The rooms from the ground up. A room is a folder, or a file at the root; it may import rooms listed before it.
ORDER = ["errors", "schema", "struct", "typing", "segments", "hashing", "files", "diffusion", "parallel", "attention",
         "models", "objective", "config", "convert", "data", "evaluation", "sampling", "runs", "training", "loading",
         "language_model", "harness", "serving", "adapt", "aot", "commands"]
BASE = {"errors", "schema", "segments", "struct", "typing"}
MODEL = BASE | {"attention", "diffusion", "models", "parallel"}
# What each room may import of those below it.
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "schema": {"errors"},
    "struct": set(),
    "typing": set(),
    "segments": {"struct", "typing"},
    "hashing": {"typing"},
    "files": {"errors", "schema"},
    "diffusion": BASE,
    "parallel": BASE,
    "attention": BASE | {"diffusion", "hashing", "parallel"},
    "models": BASE | {"attention", "parallel"},
    "objective": MODEL,
    "config": BASE | {"diffusion", "models"},
    "convert": BASE | {"files", "models"},
    "data": BASE | {"files", "models"},
    "evaluation": MODEL | {"objective"},
    "sampling": MODEL | {"hashing"},
    "runs": BASE | {"config", "files", "hashing", "models", "parallel"},
    "training": MODEL | {"config", "data", "evaluation", "files", "objective", "runs", "sampling"},
    "loading": BASE | {"convert", "data", "files", "models", "runs"},
    "language_model": MODEL | {"convert", "data", "evaluation", "files", "loading", "sampling"},
    "harness": BASE | {"convert", "data", "evaluation", "files", "language_model", "models", "sampling", "training"},
    "serving": BASE | {"data", "language_model", "sampling"},
    "adapt": set(ORDER[:-3]) - {"harness", "serving"},
    "aot": set(ORDER[:-3]) - {"harness", "language_model", "serving"},
    "commands": set(ORDER[:-1]),
}
DOORS = {"__init__", "__main__"}  # they open the house, and no room imports them
IMPORTS_TORCH = {"convert/modeling_dlm.py"}  # travels with an export; nothing here imports it
MAY_IMPORT_TORCH = {"commands/demo.py"}  # inside a function, where PyTorch is installed


def room(path: Path) -> str:
    """The room that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> set[str]:
    """Every dotted name that is imported anywhere under `tree`; relative imports do not occur."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported_rooms(path: Path) -> set[str]:
    """The other rooms that a file imports; the version at the root is everybody's."""
    found = {name.split(".")[1] for name in imports(parse(path)) if name.startswith("dlm_jax.")}
    return found - {room(path), "__version__"}


def test_every_file_is_in_a_known_room():
    assert {room(path) for path in FILES} == MAY_IMPORT.keys() | DOORS


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_room_imports_only_what_it_may(name):
    for path in FILES:
        if room(path) == name:
            extra = imported_rooms(path) - MAY_IMPORT[name]
            assert not extra, f"{path.relative_to(ROOT)} imports {extra}"


def test_imports_lead_downward_only():
    assert sorted(ORDER) == sorted(MAY_IMPORT)
    for name in ORDER:
        assert MAY_IMPORT[name] <= set(ORDER[:ORDER.index(name)]), name


def test_the_root_holds_only_what_a_user_imports():
    assert len(list(ROOT.glob("*.py"))) <= 11


def test_nothing_is_a_flax_module():
    for path in FILES:
        stateful = {name for name in imports(parse(path)) if name.startswith(("flax.nnx", "flax.linen"))}
        assert not stateful, f"{path.relative_to(ROOT)} imports {stateful}"


def test_nothing_needs_pytorch():
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        tree = parse(path)
        uses = {module for module in imports(tree) if module.split(".")[0] == "torch"}
        assert not uses or name in IMPORTS_TORCH | MAY_IMPORT_TORCH, f"{name} imports {uses}"
        outside = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        if name in MAY_IMPORT_TORCH:
            assert not any(module.split(".")[0] == "torch" for module in imports(outside))
        assert not any(module.endswith("modeling_dlm") for module in imports(tree)), name


def test_files_and_functions_are_short_enough_to_read():
    for path in FILES:
        name, text = path.relative_to(ROOT).as_posix(), path.read_text()
        assert len(text.splitlines()) <= (600 if name in IMPORTS_TORCH else 350), name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"


def cpu_seconds(statement: str) -> float:
    """CPU seconds of a statement, the best of three, each measured in a process of its own."""
    code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}) for _ in range(3)]
    return min(float(done.stdout) for done in run)


@pytest.mark.slow
def test_the_front_door_opens_within_two_seconds_of_jax():
    extra = cpu_seconds("import dlm_jax; dlm_jax.load") - cpu_seconds("import jax")
    assert extra < 2, f"importing dlm_jax and its `load` takes {extra:.1f} s longer than importing jax"


def absent(statement: str, modules: set[str]) -> None:
    """Asserts that a fresh Python has none of the modules after the statement."""
    code = f"import sys\n{statement}\nassert not {modules!r} & set(sys.modules), {modules!r} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_training_and_sampling_do_not_load_pytorch():
    absent("import dlm_jax.adapt, dlm_jax.commands.sample_file\ndlm_jax.load('bundled').text_tokenizer()",
           {"torch", "tensorflow"})


def test_reading_a_model_and_sampling_load_neither_optax_nor_the_trainer():
    absent("import dlm_jax; dlm_jax.load('bundled').sample('import', max_tokens=2)",
           {"optax", "dlm_jax.training.step", "dlm_jax.training.run"})


def test_importing_the_package_alone_imports_nothing_heavy():
    absent("import dlm_jax, dlm_jax.attention, dlm_jax.sampling, dlm_jax.diffusion", {"jax", "torch", "transformers"})


def test_the_command_line_parses_its_arguments_without_jax():
    absent("from dlm_jax.commands.main import make_parser; make_parser()", {"jax", "torch", "transformers"})
