"""What the documentation site (`mkdocs.yml`) has beyond the files of docs/: the whole API from its docstrings, pages of
the top of the repository, the notebooks, and `llms.txt`, a list of all pages for language models.
"""

import importlib
import re
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = runpy.run_path(str(Path(__file__).with_name("make_api.py")))["PACKAGES"]
FROM_TOP = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}  # page: file at the top


def on_config(config: Any) -> Any:
    """Puts a page for each package where the navigation says `API`."""
    pages = [{package: f"api/{package}.md"} for package in PACKAGES]
    for section in config.nav:
        for entries in section.values():
            for entry in entries if isinstance(entries, list) else ():
                for title, target in entry.items():
                    entry[title] = pages if target == "API" else target
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and files that are not under docs/."""
    from mkdocs.structure.files import File
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=api_page(package)))
    for page, name in FROM_TOP.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=links_from_top(text)))
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        files.append(File.generated(config, f"notebooks/{notebook.name}", abs_src_path=str(notebook)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to files beside docs/ lead to their copies in the site; comments for the tests go."""
    for page, name in FROM_TOP.items():
        markdown = markdown.replace(f"](../{name}", f"]({page}")
    markdown = markdown.replace("](../notebooks/", "](notebooks/")
    return re.sub(r"<!-- not run: .*? -->\n", "", markdown)


def links_from_top(text: str) -> str:
    """Links of a file at the top of the repository, as they are from the top of the site."""
    for page, name in FROM_TOP.items():
        text = text.replace(f"]({name}", f"]({page}")
    return text.replace("](docs/", "](").replace("](README.md", "](index.md")


def on_post_build(config: Any) -> None:
    """Writes llms.txt: each page with its first sentence."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}", ""]
    for section in config.nav:
        for title, entries in section.items():
            lines += [f"## {title}", ""]
            for page in entries if isinstance(entries, list) else [{title: entries}]:
                [(name, target)] = page.items()
                if isinstance(target, str):
                    lines.append(f"- [{name}]({address(target)}): {first_sentence(target)}")
            lines.append("")
    Path(config.site_dir, "llms.txt").write_text("\n".join(lines), encoding="utf-8")


def address(page: str) -> str:
    """Where a page is, from the top of the site."""
    return "./" if page == "index.md" else page.removesuffix(".md") + "/"


def first_sentence(page: str) -> str:
    """The first sentence of a page's prose."""
    path = ROOT / FROM_TOP[page] if page in FROM_TOP else Path(__file__).parent / page
    blocks = re.sub(r"```.*?```|<!--.*?-->", "", path.read_text(encoding="utf-8"), flags=re.S).split("\n\n")
    prose = next((" ".join(block.split()) for block in blocks if re.match(r"(?!Generated)[A-Za-z]", block)), "")
    return re.split(r"(?<=[.?!])\s", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", prose))[0].rstrip(":")


def api_page(package: str) -> str:
    """The directives by which mkdocstrings writes down a package."""
    module = importlib.import_module(package)
    names = [f"::: {package}.{name}\n" for name in module.__all__]
    return f"# {package}\n\n{(module.__doc__ or '').strip()}\n\n" + "\n".join(names)
