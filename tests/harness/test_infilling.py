"""Filling the middle of texts: what the authors wrote gets the best grade, and anything else what it deserves."""

import dataclasses
import itertools
import json

import pytest

import dlm_jax
from dlm_jax.commands.main import main
from dlm_jax.errors import UserError
from dlm_jax.harness.data_files import find
from dlm_jax.harness.infilling import TASKS, Middle, evaluate_infilling, hole, pass_at_1, rocstories, rouge
from dlm_jax.sampling.settings import Settings

ADD = {"prompt": "def add(a, b):\n", "canonical_solution": "    c = a + b\n", "suffix": "    return c\n",
       "test": "def check(f):\n    assert f(2, 3) == 5\n", "entry_point": "add", "task_id": "add"}
STORY = "\n".join([
    ",".join([*(f"InputSentence{i}" for i in range(1, 5)), "RandomFifthSentenceQuiz1", "RandomFifthSentenceQuiz2",
              "AnswerRightEnding"]),
    "Tom woke up.,He was hungry.,He made eggs.,They were good.,He cried.,He smiled.,2", ""])


@pytest.fixture(scope="module")
def blocks():
    lm = dlm_jax.load("bundled").with_mask()
    return dataclasses.replace(lm, spec=dataclasses.replace(lm.spec, rule="bidirectional"))


@pytest.fixture
def data(tmp_path):
    long = ADD | {"prompt": "x = 1\n" * 2000 + ADD["prompt"]}
    (tmp_path / "humaneval_infilling").mkdir()
    (tmp_path / "humaneval_infilling" / "HumanEval-SingleLineInfilling.jsonl").write_text(
        "".join(json.dumps(task) + "\n" for task in (ADD, long)))
    (tmp_path / "cloze_test_val__spring2016.csv").write_text(STORY)
    return tmp_path


@pytest.mark.parametrize("task", [name for name in TASKS if name.startswith("humaneval")])
def test_the_authors_own_lines_pass_their_tests(task, shared):
    folder, name, read, _ = TASKS[task]
    texts = list(itertools.islice(read(find(str(shared), folder, name)), 0, 60, 10))
    assert len(texts) == 6
    for text in texts:
        assert pass_at_1(text, text.middle) == {"pass@1": 1}
        assert pass_at_1(text, "    this is no program\n") == {"pass@1": 0}


def test_the_true_middle_has_a_rouge_of_one_and_another_less():
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'dlm-jax[eval]'")
    text = Middle("", "He made some eggs.", "")
    assert rouge(text, "he made some eggs") == {"rouge1": 1, "rouge2": 1, "rougeL": 1}
    assert rouge(text, "he made a cake")["rouge1"] == pytest.approx(0.5)


def test_the_middle_of_a_story_is_its_third_sentence_and_its_end_the_right_one(data):
    [story] = rocstories(data / "cloze_test_val__spring2016.csv")
    assert story == Middle("Tom woke up. He was hungry.", " He made eggs.", " They were good. He smiled.")


def test_a_hole_is_as_wide_as_the_middle_and_what_is_right_of_it_is_shown_to_models_that_denoise(blocks):
    text = Middle("def add(a, b):\n", "    c = a + b\n", "    return c\n")
    request, left = hole(blocks, text), hole(dlm_jax.load("bundled"), text)
    width = len(blocks.text_tokenizer().encode_inside(text.middle))
    assert sum(request.masked) == sum(left.masked) == width
    assert not request.masked[-1] and left.masked[-1]
    visible = [token for token, masked in zip(request.tokens, request.masked) if not masked]
    assert blocks.text_tokenizer().decode(visible) == text.before + text.after


def test_what_does_not_fit_is_counted_and_the_rest_is_graded(blocks, data):
    found = evaluate_infilling(blocks, "humaneval_single_line", str(data), Settings(), allow_code_execution=True)
    assert found["texts"] == found["too_long"] == 1 and found["pass@1"] in (0, 1)


def test_a_model_that_writes_the_true_middle_passes(blocks, data, monkeypatch):
    monkeypatch.setattr(type(blocks.text_tokenizer()), "decode", lambda self, ids: ADD["canonical_solution"])
    found = evaluate_infilling(blocks, "humaneval_single_line", str(data), Settings(), allow_code_execution=True)
    assert found["pass@1"] == 1 and found["tokens_per_forward"] == 1


def test_programs_run_only_where_that_is_allowed(blocks, data):
    with pytest.raises(UserError, match="add --allow-code-execution"):
        evaluate_infilling(blocks, "humaneval_single_line", str(data), Settings())


def test_the_command_fills_stories(data, capsys):
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'dlm-jax[eval]'")
    assert main(["eval", "bundled", "--tasks", "rocstories_infill", "--data", str(data), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["task"] == "rocstories_infill" and found["texts"] == 1 and 0 <= found["rougeL"] <= 1


@pytest.mark.parametrize("task,name,text,said", (
    ("humaneval_single_line", "HumanEval-SingleLineInfilling.jsonl", '{"prompt": 3}\n', "line 1"),
    ("humaneval_single_line", "HumanEval-SingleLineInfilling.jsonl", "no\n", "line 1 is not JSON"),
    ("rocstories_infill", "cloze_test_val__spring2016.csv", STORY.replace(",2\n", ",3\n"), "line 2"),
    ("rocstories_infill", "cloze_test_val__spring2016.csv", "a,b\n1,2\n", "line 2")))
def test_a_damaged_file_is_refused(tmp_path, blocks, task, name, text, said):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        evaluate_infilling(blocks, task, str(tmp_path), Settings(), allow_code_execution=True)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="there is no a.csv in .* nor in"):
        find(str(tmp_path), "stories", "a.csv")
