"""The house: which part may know which, what is never imported, and how fast the front door opens."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import dlm_jax

ROOT = Path(dlm_jax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# What each part may import of the others. A part is a folder or a file at the top.
MODEL = {"attention", "diffusion", "mesh", "models", "noise", "losses", "config", "files", "errors"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "files": {"errors"},
    "diffusion": {"errors"},
    "cluster": {"errors"},
    "collectives": set(),
    "hardware": set(),
    "mesh": {"errors"},
    "attention": {"mesh", "errors"},
    "topology": {"errors", "hardware"},
    "models": {"attention", "mesh", "errors"},
    "config": {"diffusion", "models", "errors"},
    "noise": {"attention", "diffusion"},
    "head_loss": {"diffusion", "mesh", "models"},
    "losses": {"attention", "diffusion", "head_loss", "mesh", "models", "noise"},
    "convert": {"models", "files", "errors"},
    "data": {"diffusion", "models", "files", "errors"},
    "sampling": MODEL,
    "evaluation": MODEL,
    # The loop reads records and measures the validation loss.
    "training": MODEL | {"cluster", "data", "evaluation", "hardware"},
}
# What joins the parts for the user may import any of them, and none of them may import it.
FRONT = {"__init__", "adapt", "aot", "aot_search", "assets", "cli", "commands", "demo", "exporting", "importing",
         "language_model", "many", "on_policy", "opening"}
TORCH_AT_HOME = {"convert/modeling_dlm.py"}  # travels with an export; nothing here imports it
TORCH_ON_DEMAND = {"demo.py"}  # inside a function, where PyTorch is installed


def part(path: Path) -> str:
    """The part that a file belongs to."""
    top = path.relative_to(ROOT).parts[0]
    return top.removesuffix(".py")


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


def ours(path: Path) -> set[str]:
    """The other parts that a file imports."""
    found = {name.split(".")[1] for name in imports(parse(path)) if name.startswith("dlm_jax.")}
    return found - {part(path)}


def test_every_part_has_its_place():
    assert {part(path) for path in FILES} <= MAY_IMPORT.keys() | FRONT


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_arrows_go_one_way(name):
    for path in FILES:
        if part(path) == name:
            assert ours(path) <= MAY_IMPORT[name], f"{path.relative_to(ROOT)} imports {ours(path) - MAY_IMPORT[name]}"


def test_no_arrow_leads_back():
    order: list[str] = []
    waiting = dict(MAY_IMPORT)
    while waiting:
        ready = [name for name, known in waiting.items() if known <= set(order)]
        assert ready, f"these know each other in a circle: {', '.join(waiting)}"
        order += ready
        for name in ready:
            del waiting[name]


def test_nobody_imports_the_command_line():
    assert not [path for path in FILES if "cli" in ours(path)]


def test_nothing_is_a_flax_module():
    for path in FILES:
        stateful = {name for name in imports(parse(path)) if name.startswith(("flax.nnx", "flax.linen"))}
        assert not stateful, f"{path.relative_to(ROOT)} imports {stateful}"


def test_pytorch_is_needed_by_nobody():
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        tree = parse(path)
        uses = {module for module in imports(tree) if module.split(".")[0] == "torch"}
        assert not uses or name in TORCH_AT_HOME | TORCH_ON_DEMAND, f"{name} imports {uses}"
        outside = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
        if name in TORCH_ON_DEMAND:
            assert not any(module.split(".")[0] == "torch" for module in imports(outside))
        assert not any(module.endswith("modeling_dlm") for module in imports(tree)), name


def test_files_stay_short_enough_to_read():
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines()) for path in FILES}
    assert not {name: n for name, n in lengths.items() if n > (450 if name in TORCH_AT_HOME else 400)}


def seconds_to_import(statement: str) -> float:
    """Seconds of CPU, best of three, each in a process of its own that measures itself."""
    code = f"import time; t = time.process_time(); {statement}; print(time.process_time() - t)"
    run = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}) for _ in range(3)]
    return min(float(done.stdout) for done in run)


def test_the_front_door_opens_at_most_two_seconds_after_jax():
    extra = seconds_to_import("import dlm_jax; dlm_jax.load") - seconds_to_import("import jax")
    assert extra < 2, f"importing dlm_jax and its `load` takes {extra:.1f} s longer than importing jax"


def test_what_trains_and_samples_does_not_load_pytorch():
    code = ("import sys, dlm_jax.adapt, dlm_jax.many\ndlm_jax.load('bundled').text_tokenizer()\n"
            "assert not {'torch', 'tensorflow'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_alone_imports_nothing_heavy():
    code = "import sys, dlm_jax; assert not {'jax', 'torch', 'transformers'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
