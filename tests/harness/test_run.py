"""`dlm eval` with tasks of lm-evaluation-harness: real processes, real task files."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'dlm-jax[eval]'")

from dlm_jax.commands.main import main
from dlm_jax.errors import UserError
from dlm_jax.harness.compare import paired_difference
from dlm_jax.harness.run import OWN_TASKS
from dlm_jax.harness.tasks import documents

GOALS = [{"goal": f"To sweep {n} rooms", "sol1": f"take {n} brooms and begin.", "sol2": f"eat {n} cakes and sit."}
         for n in range(12)]
GRID = "4321\n1243\n2134\n3412"
FILES = {
    "piqa/valid.jsonl": "".join(json.dumps(goal) + "\n" for goal in GOALS),
    "piqa/valid-labels.lst": "0\n1\n" * 6,
    "siqa/dev.jsonl": json.dumps({"context": "Tom fell.", "question": "How is he?", "answerA": "sad", "answerB": "glad",
                                  "answerC": "tall"}) + "\n",
    "siqa/dev-labels.lst": "1\n",
    "winogrande/dev.jsonl": json.dumps({"sentence": "The cup fell off the shelf since _ was small.", "option1": "it",
                                        "option2": "the shelf", "answer": "2"}) + "\n",
    "countdown/cd3_test.jsonl": "".join(json.dumps({"input": f"{n},1,{n + 1}", "output": f"{n}+1={n + 1}"}) + "\n"
                                        for n in range(5)),
    "lambada_test_plain_text.txt": "the cat sat on the mat\nthe dog ran up the hill\n",
    "hellaswag/hellaswag_val_full.txt": "A man runs. he\n2\nsits.\neats.\nstops.\nsings.\n",
    "gsm8k/train.jsonl": "".join(json.dumps({"question": f"{n} and 1?", "answer": f"#### {n + 1}"}) + "\n"
                                 for n in range(9)),
    "sudoku/sudoku.jsonl": "".join(json.dumps({"input": GRID.replace(cell, "0"), "output": GRID}) + "\n"
                                   for cell in "1234"),
    "triviaqa/wikipedia-dev.json": json.dumps({"Data": [
        {"Question": f"Who swept room {n}", "Answer": {"Value": "Tom", "Aliases": ["Tom", "Thomas"]}}
        for n in range(3)]}),
    "gsm8k/test.jsonl": json.dumps({"question": "2 and 2?", "answer": "It is 4.\n#### 4"}) + "\n",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small file of each task, as its authors lay it out."""
    folder = tmp_path_factory.mktemp("data")
    for name, text in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


def evaluate(*flags):
    """The process of a `dlm eval` of the bundled model."""
    return subprocess.Popen([sys.executable, "-m", "dlm_jax", "eval", "bundled", "--json", *map(str, flags)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ)


def scores(found):
    """The accuracies and exact matches of a task, of which it has at least one."""
    values = [value for key, value in found.items() if key.split(",")[0] in ("acc", "exact_match")]
    assert values, found
    return values


def result(process):
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.slow
def test_every_task_of_ours_reads_its_files_and_is_scored(data, capsys):
    tasks = sorted(path.stem for path in OWN_TASKS.glob("*.yaml"))
    flags = ["--tasks", ",".join(tasks), "--data", str(data), "--num-fewshot", "1", "--json"]
    assert main(["eval", "bundled", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert sorted(found) == tasks
    assert all(0 <= value <= 1 for task in tasks for value in scores(found[task]))


def test_the_documents_are_those_of_the_files(data):
    assert documents.piqa(str(data))["test"][3] == GOALS[3] | {"label": 1}
    assert documents.hellaswag(str(data))["test"][0]["choices"] == ["sits.", "eats.", "stops.", "sings."]
    assert documents.lambada(str(data))["test"]["text"][0] == "the cat sat on the mat"
    assert len(documents.gsm8k(str(data))["train"]) == 9


def test_a_packed_file_is_read_as_the_plain_one(data, tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("one\n\ntwo\n")
    assert documents.lines(str(tmp_path), "task", "a.txt", "a.txt.gz") == ["one", "two"]


def test_files_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match="no valid.jsonl in .* nor in .*piqa"):
        documents.piqa(str(tmp_path))
    with pytest.raises(UserError, match="name their folder with --data"):
        documents.piqa()


@pytest.mark.parametrize("flags,said", (
    (["--tasks", "nosuch"], "there is no task nosuch"), (["--tasks", "piqa,,"], "is not a list of tasks"),
    (["--tasks", "piqa_local"], "name their folder with --data"),
    (["--tasks", "nelbo"], "name their files with --text"),
    (["--tasks", "piqa_local", "--text", "a.txt"], "--text is for nelbo and ar_nll")))
def test_a_task_that_cannot_be_run_is_refused(flags, said, capsys):
    assert main(["eval", "bundled", *flags]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("dlm: ") and said in error


@pytest.mark.parametrize("name,text,said", (
    ("valid.jsonl", "{", "line 1 is not JSON"), ("valid-labels.lst", "0\n", "a number for each of the 12 questions"),
    ("valid-labels.lst", "\xff" * 12, "a number for each")))
def test_a_damaged_file_is_refused(data, tmp_path, name, text, said):
    for file in ("valid.jsonl", "valid-labels.lst"):
        (tmp_path / file).write_text(text if file == name else FILES[f"piqa/{file}"])
    with pytest.raises(UserError, match=said):
        documents.piqa(str(tmp_path))


def test_without_the_harness_its_tasks_are_refused(data, capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "dlm_jax.harness.model", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    assert main(["eval", "bundled", "--tasks", "piqa_local", "--data", str(data)]) == 2
    assert "pip install 'dlm-jax[eval]'" in capsys.readouterr().err


def test_a_chat_format_that_the_tokenizer_lacks_is_refused(data, capsys):
    assert main(["eval", "bundled", "--tasks", "piqa_local", "--data", str(data), "--apply-chat-template"]) == 2
    assert "has no chat template; leave out --apply-chat-template" in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_that_was_killed_and_is_run_again_asks_nothing_twice_and_ends_alike(data, tmp_path):
    flags = ["--tasks", "piqa_local,hellaswag_local", "--data", data]
    expected = result(evaluate(*flags, "--out", tmp_path / "whole"))
    process = evaluate(*flags, "--out", tmp_path / "killed")
    while not list((tmp_path / "killed").glob("answers-*")) if (tmp_path / "killed").exists() else True:
        time.sleep(0.05)
        assert process.poll() is None
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert result(evaluate(*flags, "--out", tmp_path / "killed")) == expected
    again = evaluate(*flags, "--out", tmp_path / "killed")
    assert "log likelihood" not in again.communicate(timeout=600)[1]
    report = json.loads((tmp_path / "killed" / "results.json").read_text())
    assert report["results"]["piqa_local"]["acc,none"] == expected["piqa_local"]["acc"]


@pytest.mark.slow
def test_the_harness_own_command_knows_the_model(data):
    command = ["--model", "dlm_jax", "--model_args", "pretrained=bundled", "--tasks", "piqa_local", "--include_path",
               str(OWN_TASKS), "--metadata", f"data={data}"]
    done = subprocess.run([sys.executable, "-m", "dlm_jax.harness", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|piqa_local|" in done.stdout.replace(" ", "")


def test_two_models_are_compared_on_the_same_documents(data, capsys):
    flags = ["--tasks", "piqa_local", "--data", str(data), "--against", "bundled", "--json"]
    assert main(["eval", "bundled", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["against"]["piqa_local"] == found["piqa_local"]
    assert found["difference"]["piqa_local"]["acc"] == {"difference": 0, "low": 0, "high": 0, "exceeds_noise": False}


def test_the_interval_of_a_paired_difference_is_that_of_its_standard_error():
    random = np.random.default_rng(1)
    shared = random.random(400)  # what both have in common makes the difference no less certain
    first, second = (shared + 0.1 * random.normal(size=400) for _ in range(2))
    found = paired_difference(first + 0.05, second)
    error = np.std(first - second) / 20
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)
    assert found.exceeds_noise and not paired_difference(first, first[::-1]).exceeds_noise
