"""docs/api.md lists every exported name as it is."""

import importlib
import runpy
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"
GENERATOR = runpy.run_path(str(DOCS / "make_api.py"), run_name="make_api")


def test_the_api_reference_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = GENERATOR["render"]()
    assert (DOCS / "api.md").read_text(encoding="utf-8") == expected, "run `python docs/make_api.py`"


@pytest.mark.parametrize("name", GENERATOR["PACKAGES"])
def test_every_exported_name_exists_and_is_documented(name: str) -> None:
    package = importlib.import_module(name)
    assert getattr(package, "__all__", ()), f"{name} exports nothing"
    for exported in package.__all__:
        thing = getattr(package, exported)
        if callable(thing) and not getattr(thing, "__origin__", None):
            assert GENERATOR["first_sentence"](thing), f"{name}.{exported} has no docstring"
