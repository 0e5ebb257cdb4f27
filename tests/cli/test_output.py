"""stdout holds the result and nothing else; stderr holds progress and no noise of the libraries below."""

import json
import os
import subprocess
import sys

import pytest

from dlm_jax.cli import main

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_a_sample_is_all_there_is_on_stdout_and_stderr_is_empty(process, workdir):
    result = process("sample", workdir, "--prompt", "the cat", "--max-tokens", 4)
    assert (result.code, result.err) == (0, "") and result.out.startswith("the cat")


def test_json_is_all_there_is_on_stdout(process, workdir, texts):
    result = process("eval", workdir, "--task", "nelbo", "--text", texts, "--limit", 2, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["task"] == "nelbo" and result.out.count("\n") == 1


def test_import_says_what_it_read(process, base, tmp_path):
    result = process("import", base, "--out", tmp_path / "m", "--mask", "new")
    assert (result.code, result.err) == (0, "")
    assert [line.split(": ")[0] for line in result.out.splitlines()] == [
        "out", "family", "parameters", "mask_token_id", "alignment", "rule"]


def test_training_tells_its_steps_on_stderr_and_its_outcome_on_stdout(dlm, tiny_config, tiny_run, tmp_path):
    overrides = [*tiny_run, "train.steps=2", "recipe.anneal_steps=0", "optimizer.warmup=0"]
    result = dlm("train", "--config", tiny_config, "--workdir", tmp_path / "run", *(f"--config.{o}" for o in overrides))
    assert [line.split(": ")[0] for line in result.out.splitlines()] == [
        "workdir", "steps", "nelbo_before", "nelbo_after", "seconds", "goodput", "skipped"]
    assert [line.split("  ")[0] for line in result.err.splitlines()] == ["step 0/2", "step 1/2", "step 2/2", "step 2/2"]


def test_watching_draws_on_stderr(dlm, workdir):
    result = dlm("infill", workdir, "the [MASK:3] mat", "--watch")
    assert result.code == 0 and result.out.startswith("the ") and result.out.count("\n") == 1 and result.err


def test_pictures_are_drawn_where_they_are_asked_for(dlm, workdir, tmp_path):
    result = dlm("infill", workdir, "the [MASK:3] mat", "--gif", tmp_path / "a.gif", "--html", tmp_path / "a.html")
    assert result.code == 0 and result.err == ""
    assert (tmp_path / "a.gif").read_bytes().startswith(b"GIF89a")
    assert "<!doctype html>" in (tmp_path / "a.html").read_text()


def test_a_reader_of_stdout_may_leave_early():
    """As `head` does: no traceback, no complaint."""
    script = "from dlm_jax import cli, commands; commands.run_sample = lambda a: print('x' * 10**6) or {}; cli.main()"
    code = f"import sys; {script.replace('cli.main()', 'sys.exit(cli.main())')}"
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code, "sample", "m"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["demo", "import", "export", "prepare", "train", "sample", "infill", "eval"])
def test_every_flag_of_every_command_is_explained(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    help = capsys.readouterr().out
    lines = help[help.index("options:"):].splitlines()[1:]
    for line, after in zip(lines, [*lines[1:], ""]):
        if line.startswith("  -"):
            assert len(line.split("  ")) > 2 or after.startswith("     "), line
