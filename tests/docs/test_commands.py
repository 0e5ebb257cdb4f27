"""Every command that a page shows exists, with its flags; the pages that a newcomer follows run from top to bottom."""

import argparse
import os
import re
import runpy
import shlex
import subprocess
import sys

import pytest

from dlm_jax.commands.arguments import take_overrides
from dlm_jax.commands.main import make_parser
from dlm_jax.config import load_config
from dlm_jax.config.named import named_configs

# Run from top to bottom, in this order and in one directory.
FOLLOWED = ("docs/index.md", "docs/tutorials/adapt_a_model.md", "docs/tutorials/fill_in_code.md",
            "docs/tutorials/to_pytorch_and_engines.md", "docs/tutorials/pod_without_a_pod.md", "docs/data_at_scale.md",
            "docs/adapters.md")
PROGRAMS = re.compile(r"(dlm|python|make|pip|sbatch|docker) |launch/\w+\.")
SECONDS = 900  # for one block
SHORTER = {"train.steps=200": "train.steps=20"}  # a newcomer wants a better model than this test


def commands(block):
    """The commands of a block, each as words."""
    for line in block.code.replace("\\\n", " ").splitlines():
        if PROGRAMS.match(line):
            yield shlex.split(line, comments=True)


class Parsed(Exception):
    """The arguments were understood."""


def check_script(path, words, root, monkeypatch):
    """A script of ours takes these arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(parser, *arguments):
        parse(parser, *arguments)
        raise Parsed

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
        patch.setattr(sys, "argv", [path, *words])
        patch.syspath_prepend(str((root / path).parent))
        with pytest.raises(Parsed):
            runpy.run_path(str(root / path), run_name="__main__")


def check_dlm(words):
    """`dlm` takes these arguments, and a named config these keys."""
    rest, overrides = take_overrides(words)
    parsed = make_parser().parse_args(rest)
    if getattr(parsed, "config", None) in named_configs():
        load_config(parsed.config, overrides)


def check_launcher(path, words, root):
    """A launch script knows these flags."""
    script = (root / path).read_text() + (root / "launch" / "common.sh").read_text()
    ours = words[:words.index("--")] if "--" in words else words
    unknown = [word for word in ours if word.startswith("--") and word.split("=")[0] not in script]
    assert not unknown


def check(words, root, monkeypatch):
    """Checks a command without running it."""
    program, *rest = words
    if program == "dlm":
        check_dlm(rest)
    elif program == "make":
        assert all(re.search(rf"^{target}:", (root / "Makefile").read_text(), re.M) for target in rest)
    elif program == "pip":
        extras = re.findall(r'"([a-z0-9]+)": \[', (root / "setup.py").read_text())
        assert set(re.findall(r"\[(.*?)\]", " ".join(rest))) <= set(extras)
    elif program == "python" and rest[0].endswith(".py"):
        if rest[0].startswith(("benchmarks/", "launch/")):
            check_script(rest[0], rest[1:], root, monkeypatch)
    elif program.startswith("launch/"):
        check_launcher(program, rest, root)
    elif program == "sbatch":
        script = next(word for word in rest if word.startswith("launch/"))
        check_launcher(script, rest[rest.index(script) + 1:], root)
    elif program == "docker":
        assert (root / rest[rest.index("-f") + 1]).exists()
    else:
        assert words[:3] == ["python", "-m", "dlm_jax.harness"], words


def test_commands_that_are_only_shown_exist_with_their_flags(pages, root, monkeypatch):
    shown = [(block, words) for page, blocks in pages.items() for block in blocks
             if block.language in ("sh", "") and (block.not_run or page not in FOLLOWED) for words in commands(block)]
    assert len(shown) > 40
    wrong = []
    for block, words in shown:
        try:
            check(words, root, monkeypatch)
        except (Exception, SystemExit) as error:
            wrong.append(f"{block.page}: {shlex.join(words)}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)


def test_every_page_that_is_followed_says_why_a_block_is_not_run(pages):
    for page in FOLLOWED:
        assert {block.language for block in pages[page]} <= {"sh", "python"}, page


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_a_newcomer_can_follow_the_pages_from_top_to_bottom(pages, root, tmp_path):
    pytest.importorskip("torch")
    (tmp_path / "launch").symlink_to(root / "launch")
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    for page in FOLLOWED:
        for block in pages[page]:
            if not block.not_run:
                code = block.code
                for long, short in SHORTER.items():
                    code = code.replace(long, short)
                run = ["bash", "-euo", "pipefail"] if block.language == "sh" else [sys.executable]
                done = subprocess.run([*run, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                                      timeout=SECONDS)
                assert done.returncode == 0, f"{page}:\n{block.code}\n{done.stdout}{done.stderr[-2000:]}"


@pytest.mark.parametrize("page", ("masked_diffusion", "two_streams", "position_dependent_masking", "training_step"))
def test_what_an_explanation_computes_is_so(pages, page):
    names: dict = {}
    found = [block for block in pages[f"docs/explanation/{page}.md"] if block.language == "python"]
    assert found
    for block in found:
        exec(compile(block.code, block.page, "exec"), names)
