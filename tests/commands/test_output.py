"""stdout holds the result and nothing else; stderr holds progress and no noise of the libraries below."""

import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from dlm_jax.commands.arguments import UNMASKING_HELP, text_or_stdin
from dlm_jax.commands.main import COMMANDS, main
from dlm_jax.config import load_config, to_json
from dlm_jax.errors import UserError
from dlm_jax.sampling.unmasking import REVISIONS, SELECTORS

pytestmark = pytest.mark.usefixtures("compiled_once")


def test_a_sample_is_all_there_is_on_stdout_and_stderr_is_empty(process, workdir):
    result = process("sample", workdir, "--prompt", "the cat", "--max-tokens", 4)
    assert (result.code, result.err) == (0, "") and result.out.startswith("the cat")


def test_json_is_all_there_is_on_stdout(process, workdir, texts):
    result = process("eval", workdir, "--tasks", "nelbo", "--text", texts, "--limit", 2, "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["task"] == "nelbo" and result.out.count("\n") == 1


def test_import_reports_what_it_read(process, base, tmp_path):
    result = process("import", base, "--out", tmp_path / "m", "--mask", "new")
    assert (result.code, result.err) == (0, "")
    assert [line.split(": ")[0] for line in result.out.splitlines()] == [
        "out", "family", "parameters", "mask_token_id", "alignment", "rule"]


def test_training_reports_its_steps_on_stderr_and_its_outcome_on_stdout(dlm, tiny_config, tiny_run, tmp_path):
    overrides = [*tiny_run, "train.steps=2", "recipe.anneal_steps=0", "optimizer.warmup_steps=0"]
    result = dlm("train", "--config", tiny_config, "--workdir", tmp_path / "run", *(f"--config.{o}" for o in overrides))
    assert [line.split(": ")[0] for line in result.out.splitlines()] == [
        "workdir", "steps", "nelbo_before", "nelbo_after", "seconds", "goodput", "skipped"]
    assert [line.split("  ")[0] for line in result.err.splitlines()] == ["step 0/2", "step 1/2", "step 2/2", "step 2/2"]


def test_watching_draws_on_stderr(dlm, workdir):
    result = dlm("infill", workdir, "the [MASK:3] mat", "--watch")
    assert result.code == 0 and result.out.startswith("the ") and result.out.count("\n") == 1 and result.err


def test_pictures_are_written_to_the_given_files(dlm, workdir, tmp_path):
    result = dlm("infill", workdir, "the [MASK:3] mat", "--gif", tmp_path / "a.gif", "--html", tmp_path / "a.html")
    assert result.code == 0 and result.err == ""
    assert (tmp_path / "a.gif").read_bytes().startswith(b"GIF89a")
    assert "<!doctype html>" in (tmp_path / "a.html").read_text()


def test_a_reader_of_stdout_may_close_it_early():
    """As `head` does: no traceback, no complaint."""
    code = ("import sys; from dlm_jax.commands import main, sample; "
            "sample.run = lambda a: print('x' * 10**6) or {}; sys.exit(main.main())")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", code, "sample", "m"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_every_command_is_explained(command, capsys):
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    help = capsys.readouterr().out
    lines = help[help.index("options:"):].splitlines()[1:]
    for line, after in zip(lines, [*lines[1:], ""]):
        if line.startswith("  -"):
            assert len(line.split("  ")) > 2 or after.startswith("     "), line


@pytest.mark.parametrize("json_flag", [["--json"], []])
@pytest.mark.parametrize("result", [{"nats_per_token": float("nan")}, {"seconds": {"compute": float("inf")}}])
def test_a_number_that_is_not_finite_is_an_error_and_never_a_result(dlm, monkeypatch, result, json_flag):
    monkeypatch.setattr("dlm_jax.commands.evaluate.run", lambda a: result)
    done = dlm("eval", "m", "--tasks", "nelbo", "--text", "t", *json_flag)
    assert (done.code, done.out) == (2, "") and "because the model computes with numbers too large" in done.err


def test_the_likelihood_under_weights_that_overflow_is_an_error(dlm, base, texts, tmp_path):
    import jax

    from dlm_jax.convert.native import write_native
    from dlm_jax.loading import load_bundle
    bundle = load_bundle(base)
    copy = shutil.copytree(base, tmp_path / "m", ignore=shutil.ignore_patterns("config.json", "*.safetensors"))
    wild = bundle.params | {"head": jax.tree.map(lambda w: np.sign(w) * np.finfo(w.dtype).max, bundle.params["head"])}
    write_native(copy, dataclasses.replace(bundle, params=wild))
    done = dlm("eval", copy, "--tasks", "ar_nll", "--text", texts, "--limit", 1, "--json")
    assert (done.code, done.out) == (2, "") and done.err.startswith("dlm: nats_per_token is nan")


def test_names_and_errors_are_printed_without_what_a_terminal_would_obey(dlm, monkeypatch):
    name = "a\x1b[2J\u202eb"
    monkeypatch.setattr("dlm_jax.commands.evaluate.run", lambda a: {"name": name, "group": {"name": name}})
    arguments = ["eval", "m", "--tasks", "nelbo", "--text", "t"]
    shown = dlm(*arguments).out + dlm("sample", f"/nowhere/{name}").err
    assert shown.count(r"a\x1b[2J\u202eb") == 3 and all(char.isprintable() or char == "\n" for char in shown)


@pytest.mark.slow
def test_a_prompt_comes_from_a_pipe(process, workdir):
    sampled = process("sample", workdir, "--prompt", "-", "--max-tokens", 4, stdin=b"the cat\n")
    assert sampled.code == 0 and sampled.out.startswith("the cat") and not sampled.out.startswith("the cat\n")
    filled = process("infill", workdir, "-", stdin=b"the [MASK:2] sat\n")
    assert filled.code == 0 and filled.out.startswith("the") and filled.out.endswith("sat\n")
    refused = process("infill", workdir, "-", stdin=b"\xff")
    assert refused.code == 2 and "the text on stdin is not UTF-8" in refused.err


def test_texts_and_requests_come_and_go_through_pipes(process, workdir):
    flags = "--tasks", "nelbo", "--text", "-", "--mc-samples", 1, "--json"
    assert json.loads(process("eval", workdir, *flags, stdin=b"the cat sat").out)["nats_per_token"] > 0
    asked = b'{"id": 1, "prompt": "the"}\n{"id": 2}\n'
    served = process("sample", workdir, "--prompts", "-", "--out", "-", "--max-tokens", 2, stdin=asked)
    assert served.code == 3 and served.err == "dlm: 1 lines served, 1 refused\n"
    refused, written = map(json.loads, served.out.splitlines())
    assert (refused["id"], written["id"]) == (2, 1) and "error" in refused and len(written["tokens"]) == 2


def test_a_text_on_stdin_that_is_too_long_is_refused_and_not_cut(monkeypatch):
    monkeypatch.setattr("dlm_jax.commands.arguments.MAX_STDIN", 4)
    for text, ok in (("dlm\n", True), ("dlm-\n", False)):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        if ok:
            assert text_or_stdin("-") == "dlm"
        else:
            with pytest.raises(UserError, match="longer than 4 bytes"):
                text_or_stdin("-")


def test_the_help_of_unmasking_names_every_selector_and_revision():
    named = set(re.findall(r"[a-z_]+", UNMASKING_HELP))
    assert SELECTORS.keys() | REVISIONS.keys() <= named


def test_a_config_is_printed_as_it_resolves_and_nothing_is_trained(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", "tiny", "--print-config", "--config.train.steps=7"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["train"]["steps"] == 7 and printed["recipe"]["name"] == "diffullama"
    assert printed == json.loads(to_json(load_config("tiny", ["train.steps=7"]))) and not list(tmp_path.iterdir())


def test_a_run_needs_a_work_directory(capsys):
    assert main(["train", "--config", "tiny"]) == 2
    assert "--workdir" in capsys.readouterr().err


def test_a_sentence_that_quotes_a_whole_file_is_shortened_also_in_python():
    sentence = str(UserError(f"lora.target_modules: '{'x' * 10_000}' is not one of attention, mlp"))
    assert len(sentence) < 1100 and sentence.startswith("lora.target_modules") and sentence.endswith("attention, mlp")
