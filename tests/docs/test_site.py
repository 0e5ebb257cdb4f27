"""The site is built without a warning, its figures and lists are those of the code, and no link is dead."""

import importlib.util
import re
import runpy
import subprocess
import sys

import pytest


def module(path):
    """A script of docs/ as a dict of its names."""
    return runpy.run_path(str(path), run_name="imported")


@pytest.fixture(scope="module")
def site(root, tmp_path_factory):
    """The site, built strictly: a dead link or an unlisted page is an error."""
    if importlib.util.find_spec("mkdocs") is None:
        pytest.skip("needs the extra [docs]")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "-f", str(root / "mkdocs.yml"), "-d", str(out)],
                          capture_output=True, text=True, env={"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(root),
                                                               "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    return out


def test_every_page_is_listed_for_language_models_with_a_sentence(site):
    lines = re.findall(r"^- \[.*?\]\((.*?)\): (.*)$", (site / "llms.txt").read_text(), re.M)
    assert len(lines) > 30
    assert all((site / page / "index.html").exists() for page, _ in lines)
    assert [page for page, sentence in lines if len(sentence) < 20 and page not in ("flags/", "config_keys/")] == []


def test_the_whole_api_is_on_the_site(site):
    import dlm_jax.sampling
    text = (site / "api" / "dlm_jax.sampling" / "index.html").read_text()
    assert all(f'id="dlm_jax.sampling.{name}"' in text for name in dlm_jax.sampling.__all__)


def test_nothing_is_loaded_from_elsewhere(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="?(https?://[^"\s>]+)', page.read_text())
        assert not loaded, (page, loaded)


def test_the_figures_are_up_to_date(root):
    for name, draw in module(root / "docs" / "make_figures.py")["FIGURES"].items():
        assert (root / "docs" / "figures" / f"{name}.svg").read_text() == draw(), "run `python docs/make_figures.py`"


@pytest.mark.slow
def test_the_figures_of_compiled_programs_can_be_drawn(root):
    """Their times are the compiler's, so another version of it draws others."""
    pytest.importorskip("libtpu")
    for name, draw in module(root / "docs" / "make_figures.py")["COMPILED"].items():
        drawn = draw()
        kept = (root / "docs" / "figures" / f"{name}.svg").read_text()
        assert re.findall(">(a layer[^<]*)<", drawn) == re.findall(">(a layer[^<]*)<", kept) != []


def test_the_reference_is_up_to_date(root):
    for name, render in module(root / "docs" / "make_reference.py")["PAGES"].items():
        assert (root / "docs" / name).read_text() == render(), "run `python docs/make_reference.py`"


def test_every_key_of_a_config_is_explained(root):
    rows = re.findall(r"^\| `([\w.]+)` \|.*\| ([^|]*) \|$", (root / "docs" / "config_keys.md").read_text(), re.M)
    assert len(rows) > 60
    assert [key for key, meaning in rows if not meaning.strip()] == []


def test_links_and_figures_of_every_page_exist(pages, root):
    for page in pages:
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", (root / page).read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", prose):
            assert ((root / page).parent / target).exists(), f"{page} links to {target}, which does not exist"
