"""The pages, and the blocks of code in them."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATED = {"api.md", "flags.md", "config_keys.md"}


class Block(NamedTuple):
    """A block of code: of a shell ('sh'), of Python, or indented ('')."""

    page: str
    language: str
    code: str
    not_run: str  # why, where the page says so


def blocks_of(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    fenced = r"(?:<!-- not run: (?P<why>.*?) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)```"
    indented = r"(?<=\n\n)(?P<indented>(?:    [^\n]*\n|\n(?=    ))+)"
    return [Block(page, m["language"] or "", m["code"] or re.sub(r"^    ", "", m["indented"], flags=re.M),
                  m["why"] or "") for m in re.finditer(f"{fenced}|{indented}", text, re.DOTALL)]


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")
                                                 if path.name not in GENERATED)]


@pytest.fixture(scope="session")
def root() -> Path:
    """The top of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def pages() -> dict[str, list[Block]]:
    """The blocks of each page that a person wrote."""
    return {page: blocks_of(page) for page in PAGES}
