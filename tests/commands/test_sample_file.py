"""Many requests from a file: nothing lost, nothing done twice, and no line that harms another."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlm_jax.commands.main import main
from dlm_jax.commands.sample_file import content_of, sample_file
from dlm_jax.errors import UserError
from dlm_jax.language_model import load
from dlm_jax.sampling.settings import Settings

pytestmark = pytest.mark.usefixtures("compiled_once")

LAUNCH = Path(__file__).parents[2] / "launch" / "local_processes.py"
GOOD = [{"id": "a", "prompt": "the cat"}, {"id": 2, "infill": "the[MASK:2] dog"},
        {"id": "c", "prompt": "", "max_tokens": 3}, {"id": "d", "infill": "a[MASK:1-3] mat"},
        {"id": "e", "prompt": "and it was all quiet"}]
BAD = {"not JSON": "{", "no id": '{"prompt": "x"}', "has the id of line": '{"id": "a", "prompt": "x"}',
       "either a prompt or an infill": '{"id": 7}', "is not known": '{"id": 8, "prompt": "x", "length": 3}',
       "max_tokens: 'many', which": '{"id": 9, "prompt": "x", "max_tokens": "many"}',
       "no hole": '{"id": 10, "infill": "x"}',
       "max_tokens: 0, which": '{"id": 11, "prompt": "x", "max_tokens": 0}',
       "context": '{"id": 12, "infill": "[MASK:9999]"}',
       "mask token itself": '{"id": 13, "prompt": "<|mask|>"}',
       "minimum width above its maximum": '{"id": 14, "infill": "[MASK:5-2]"}',
       "narrow their ranges": '{"id": 15, "infill": "[MASK:1-9][MASK:1-9]"}',
       "the text and its holes take at least": json.dumps({"id": 16, "infill": f"a [MASK:{'9' * 5000}]"}),
       "prompt: ['x'], which is not text": '{"id": 17, "prompt": ["x"]}',
       "max_tokens: True": '{"id": 18, "prompt": "x", "max_tokens": true}',
       "null stands for no text": '{"id": 19, "prompt": null}',
       "half a surrogate pair": r'{"id": 20, "prompt": "\ud800"}',
       "it holds half": r'{"id": "\udfff", "prompt": "x"}',
       "nested deeper than 64": '{"id": ' + "[" * 99 + "]" * 99 + ', "prompt": "x"}',
       "it is nested deeper": '{"id": 1, "prompt": ' + "[" * 99_999 + "]" * 99_999 + "}",
       "NaN is not a number": '{"id": NaN, "prompt": "x"}', "is too large": '{"id": 1e999, "prompt": "x"}',
       "the key 'id' twice": '{"id": 1, "id": 2, "prompt": "x"}',
       "Exceeds the limit": '{"id": ' + "9" * 5000 + ', "prompt": "x"}'}


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    """A directory of an untrained diffusion model with a tokenizer."""
    directory = tmp_path_factory.mktemp("many") / "model"
    assert main(["import", str(base), "--out", str(directory), "--mask", "new", "--recipe", "diffullama"]) == 0
    return directory


@pytest.fixture(scope="module")
def lm(model):
    return load(model)


def write(file, *lines):
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return file


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def serve(lm, file, out, batch=2, host=(0, 1), **settings):
    return sample_file(lm, content_of(file), out, Settings(temperature=1.0, steps=2, **settings), 6, batch,
                       lambda *_: None, host)


def test_a_result_does_not_depend_on_the_other_lines(lm, tmp_path):
    file = write(tmp_path / "in.jsonl", *GOOD)
    assert serve(lm, file, tmp_path / "out.jsonl") == {"served": 5, "refused": 0, "before": 0}
    results = {line["id"]: line for line in read(tmp_path / "out.jsonl")}
    assert results.keys() == {"a", 2, "c", "d", "e"}
    assert all(line.keys() == {"id", "text", "tokens", "nfe"} for line in results.values())
    assert len(results["c"]["tokens"]) <= 3 and results["a"]["text"].startswith("the cat")
    alone = lm.sample("the cat", max_tokens=6, temperature=1.0, steps=2)
    assert results["a"]["text"] == alone.text and results["a"]["nfe"] == alone.nfe
    serve(lm, file, tmp_path / "again.jsonl", batch=5)
    assert {line["id"]: line for line in read(tmp_path / "again.jsonl")} == results


def test_a_bad_line_gives_its_id_and_error_and_the_others_are_served(lm, tmp_path):
    file = write(tmp_path / "in.jsonl", GOOD[0], *BAD.values(), GOOD[1])
    assert serve(lm, file, tmp_path / "out.jsonl") == {"served": 2, "refused": len(BAD), "before": 0}
    results = read(tmp_path / "out.jsonl")
    errors = [line for line in results if "error" in line]
    assert len(results) == len(BAD) + 2
    assert [line["id"] for line in errors] == [None, None, "a", *range(7, 20), *[None] * 8]
    for words, line in zip(BAD, errors, strict=True):
        assert words in line["error"] and "\n" not in line["error"]
    assert serve(lm, file, tmp_path / "out.jsonl") == {"served": 0, "refused": len(BAD), "before": 2}
    assert read(tmp_path / "out.jsonl") == results


def test_the_exit_code_and_the_last_line_say_that_lines_were_refused(model, tmp_path, capfd):
    file, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    file.write_bytes(b"\xff\n" + json.dumps(GOOD[0]).encode() + b"\n")
    arguments = ["sample", str(model), "--prompts", str(file), "--out", str(out), "--max-tokens", "3"]
    for _ in range(2):
        assert main(arguments) == 3
        assert f"1 of the lines in {file} were refused; {out} says why" in capfd.readouterr().err
    write(file, GOOD[0])
    assert main(arguments) == 0


def test_answered_lines_are_skipped_and_a_partial_line_is_served_again(lm, tmp_path):
    file, complete, out = write(tmp_path / "in.jsonl", *GOOD), tmp_path / "complete.jsonl", tmp_path / "out.jsonl"
    serve(lm, file, complete)
    lines = complete.read_bytes().splitlines(keepends=True)
    out.write_bytes(lines[0] + lines[1] + lines[2][:17])
    assert serve(lm, file, out) == {"served": 3, "refused": 0, "before": 2}
    assert sorted(out.read_bytes().splitlines()) == sorted(complete.read_bytes().splitlines())


def test_hosts_divide_the_batches_and_the_first_merges_the_files(lm, tmp_path, monkeypatch):
    from dlm_jax.commands import sample_file
    file = write(tmp_path / "in.jsonl", *GOOD, BAD["no id"])
    complete, out = tmp_path / "complete.jsonl", tmp_path / "out.jsonl"
    serve(lm, file, complete)
    with monkeypatch.context() as patch:
        patch.setattr(sample_file, "barrier", lambda _: None)
        patch.setattr(sample_file, "is_primary", lambda: False)
        serve(lm, file, out, host=(1, 2))
        assert not out.exists() and read(tmp_path / "out.jsonl.1-of-2")  # it is done before the other one starts
        patch.setattr(sample_file, "is_primary", lambda: True)
        serve(lm, file, out, host=(0, 2))
    assert sorted(out.read_bytes().splitlines()) == sorted(complete.read_bytes().splitlines())
    assert {path.name for path in tmp_path.iterdir()} == {"in.jsonl", "complete.jsonl", "out.jsonl"}


@pytest.mark.slow
def test_two_processes_give_what_one_gives(model, lm, tmp_path):
    file, out = write(tmp_path / "in.jsonl", *GOOD, BAD["no hole"]), tmp_path / "out.jsonl"
    serve(lm, file, tmp_path / "one.jsonl")
    done = subprocess.run([sys.executable, LAUNCH, "--processes", "2", "--devices-per-process", "2", "--",
                           sys.executable, "-m", "dlm_jax", "sample", model, "--prompts", file, "--out", out,
                           "--batch", "2", "--temperature", "1", "--steps", "2", "--max-tokens", "6"],
                          env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 3, done.stdout + done.stderr
    assert all(done.stdout.count(said) == 1 for said in ("served: 5", "refused: 1", "before: 0"))
    assert sorted(read(out), key=str) == sorted(read(tmp_path / "one.jsonl"), key=str)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "one.jsonl", "out.jsonl"]


@pytest.mark.slow
def test_a_killed_command_resumes_with_nothing_lost_or_doubled(lm, model, tmp_path):
    file = write(tmp_path / "in.jsonl", *({"id": i, "prompt": "the cat sat"[:3 + i % 8]} for i in range(60)))
    out, complete = tmp_path / "out.jsonl", tmp_path / "complete.jsonl"
    arguments = ["sample", str(model), "--prompts", str(file), "--out", str(out), "--batch", "2", "--temperature", "1",
                 "--steps", "2", "--max-tokens", "6"]
    process = subprocess.Popen([sys.executable, "-m", "dlm_jax", *arguments], stderr=subprocess.DEVNULL,
                               env=os.environ | {"JAX_PLATFORMS": "cpu"})
    for _ in range(2400):
        if process.poll() is not None or (out.exists() and out.stat().st_size > 200):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert main(arguments) == 0
    serve(lm, file, complete, batch=16)
    assert sorted(out.read_bytes().splitlines()) == sorted(complete.read_bytes().splitlines())


def test_unsuitable_files_are_refused_and_left_alone(lm, tmp_path):
    letter = write(tmp_path / "letter.txt", "dear")
    with pytest.raises(UserError, match="was not written by"):
        serve(lm, write(tmp_path / "in.jsonl", GOOD[0]), letter)
    with pytest.raises(UserError, match="cannot read"):
        serve(lm, tmp_path / "absent.jsonl", tmp_path / "out.jsonl")
    with pytest.raises(UserError, match="block_causal models"):
        serve(lm, tmp_path / "in.jsonl", tmp_path / "out.jsonl", cache="block")
    assert letter.read_text() == "dear\n" and not (tmp_path / "out.jsonl").exists()
