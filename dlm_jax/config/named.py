"""The configs that come with the package, by name: `tiny` is `configs/tiny.py`."""

import ast
from pathlib import Path

from dlm_jax.errors import UserError

PACKAGE = Path(__file__).parents[1]
# An installed package holds them; a clone has them beside the package, where a reader finds them (see setup.py).
FOLDER = next(folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir())


def named_configs() -> dict[str, Path]:
    """The file of each name, sorted."""
    return {file.stem: file for file in sorted(FOLDER.glob("*.py"))}


def config_file(name: str | Path) -> Path:
    """The file of a named config, or else the one at this path; './tiny' is a path. Raises `UserError` if neither is
    there."""
    file = named_configs().get(str(name), Path(name))
    if not file.is_file():
        raise UserError(f"there is no config file {name}; name a file, or one of {', '.join(named_configs())}")
    return file


def purpose_of(file: Path) -> str:
    """What a config file is for: the first line of its docstring."""
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").partition("\n")[0]
