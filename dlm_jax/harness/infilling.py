"""Filling the middle of a text from both sides, which lm-evaluation-harness has no request for.

The hole is as wide as the true middle in tokens, as DiffuLLaMA's evaluation has it. A model that sees only the left
(autoregressive, or block-causal beyond its block) is given the same number of tokens.
"""

import csv
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from dlm_jax.data.text import check_text, json_lines, numbered_lines
from dlm_jax.errors import UserError
from dlm_jax.harness.data_files import TRIVIAQA_FILE, find, trivia_questions
from dlm_jax.harness.execution import check_confinement, passes
from dlm_jax.language_model import LanguageModel
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.settings import Settings

BATCH = 16
FIELDS = ("prompt", "canonical_solution", "suffix", "test", "entry_point")  # of HumanEval infilling
COLUMNS = (*(f"InputSentence{i}" for i in range(1, 5)), "AnswerRightEnding")  # of ROCStories


class Middle(NamedTuple):
    """A text in three parts, and what its grade needs besides."""

    before: str
    middle: str
    after: str
    tests: str = ""  # that a program must pass
    accepted: tuple[str, ...] = ()  # answers to a question


Grade = Callable[[Middle, str], dict[str, float]]  # of what was written instead of the middle: each from 0 to 1


def humaneval(path: Path) -> Iterator[Middle]:
    """A file of OpenAI's HumanEval infilling benchmark (Bavarian et al. 2022), plain or `.gz`."""
    for where, task in json_lines(str(path)):
        before, middle, after, test, name = (check_text(task.get(field), where, field) for field in FIELDS)
        yield Middle(before, middle, after, f"{test}\ncheck({name})\n")


def rocstories(path: Path) -> Iterator[Middle]:
    """The third of five sentences of each story, from `cloze_test_val__spring2016.csv` (Mostafazadeh et al. 2016)."""
    reader = csv.DictReader(line for _, line in numbered_lines(str(path)))
    for row in reader:
        where = f"{path}, line {reader.line_num}"
        one, two, three, four, right = (check_text(row.get(column), where, column) for column in COLUMNS)
        column = f"RandomFifthSentenceQuiz{right}"
        yield Middle(f"{one} {two}", f" {three}", f" {four} {check_text(row.get(column), where, column)}")


def lambada(path: Path) -> Iterator[Middle]:
    """The last word of each passage, from `lambada_test_plain_text.txt` (Paperno et al. 2016)."""
    for _, line in numbered_lines(str(path)):
        before, space, word = line.rstrip().rpartition(" ")
        if space:
            yield Middle(before, f" {word}", "")


def triviaqa(path: Path) -> Iterator[Middle]:
    """Questions without context, and their answers."""
    for question, value, accepted in trivia_questions(path):
        yield Middle(f"Question: {question}\nAnswer:", f" {value}", "", accepted=accepted)


def exact(text: Middle, written: str) -> dict[str, float]:
    """Whether `written` is the true middle, but for space around it."""
    return {"acc": float(written.strip() == text.middle.strip())}


def contains_answer(text: Middle, written: str) -> dict[str, float]:
    """Whether an accepted answer stands in `written`, by letters and digits alone."""
    said = f" {letters_and_digits(written)} "
    return {"acc": float(any(f" {letters_and_digits(answer)} " in said for answer in text.accepted))}


def letters_and_digits(text: str) -> str:
    """The words of a text in lower case, without punctuation."""
    return " ".join(re.findall(r"\w+", text.lower()))


def pass_at_1(text: Middle, written: str) -> dict[str, float]:
    """Whether the program passes its tests with `written` in its middle."""
    return {"pass@1": float(passes(text.before + written + text.after + text.tests))}


def rouge(text: Middle, written: str) -> dict[str, float]:
    """ROUGE F-measures of `written` (Lin 2004), by the package rouge-score."""
    from rouge_score.rouge_scorer import RougeScorer
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"]).score(text.middle, written)
    return {name: score.fmeasure for name, score in scores.items()}


HUMANEVAL = {"humaneval_single_line": "SingleLineInfilling", "humaneval_multi_line": "MultiLineInfilling",
             "humaneval_span": "RandomSpanInfilling", "humaneval_span_light": "RandomSpanInfillingLight"}
# name: (the folder of the file, its name, how it is read, how what was written is graded)
TASKS: dict[str, tuple[str, str, Callable[[Path], Iterator[Middle]], Grade]] = {
    **{name: ("humaneval_infilling", f"HumanEval-{kind}.jsonl.gz", humaneval, pass_at_1)
       for name, kind in HUMANEVAL.items()},
    "rocstories_infill": ("rocstories", "cloze_test_val__spring2016.csv", rocstories, rouge),
    "lambada_infill": ("lambada", "lambada_test_plain_text.txt", lambada, exact),
    "triviaqa_infill": ("triviaqa", TRIVIAQA_FILE, triviaqa, contains_answer),
}


def evaluate_infilling(lm: LanguageModel, task: str, data: str | None, settings: Settings, limit: int | None = None,
                       allow_code_execution: bool = False, progress: Callable[[int, int], None] = lambda *_: None
                       ) -> dict[str, float]:
    """The mean grades of a task of `TASKS` with their standard errors, how many texts they are over, how many did not
    fit the model's context, and tokens per forward pass.

    data: the folder of the task's file, or the folder above it. progress: called with how many texts are graded, and
    how many there are.

    Raises `UserError` if the file is not there, and for programs if they may not be run or cannot be confined.
    """
    folder, name, read, grade = TASKS[task]
    if grade is pass_at_1:
        if not allow_code_execution:
            raise UserError(f"{task} runs programs that the model has written; add --allow-code-execution to run them, "
                            "confined: without files, processes and network")
        check_confinement()
    texts = list(read(find(data, folder, name, name.removesuffix(".gz"))))[:limit]
    requests = [hole(lm, text) for text in texts]
    kept = [(text, request) for text, request in zip(texts, requests) if fits(lm, request)]
    grades, tokens, passes_made = [], 0, 0
    for start in range(0, len(kept), BATCH):
        batch = kept[start:start + BATCH]
        numbers = range(start, start + len(batch))
        for (text, request), sample in zip(batch, lm.fill([r for _, r in batch], settings, numbers)):
            written = [token for token, masked in zip(sample.tokens, request.masked) if masked]
            grades.append(grade(text, lm.text_tokenizer().decode(written)))
            tokens, passes_made = tokens + len(written), passes_made + sample.nfe
        progress(len(grades), len(kept))
    return summary(grades) | {"texts": len(kept), "too_long": len(texts) - len(kept),
                              "tokens_per_forward": tokens / max(passes_made, 1)}


def hole(lm: LanguageModel, text: Middle) -> Request:
    """The request to fill the middle; where nothing right of a hole can be read, it ends with the hole."""
    before, inside = lm.encode(text.before), lm.text_tokenizer().encode_inside
    width = max(len(inside(text.middle)), 1)
    after = inside(text.after) if lm.spec.is_diffusion else []
    return Request([*before, *[0] * width, *after], [False] * len(before) + [True] * width + [False] * len(after),
                   stop=False)


def fits(lm: LanguageModel, request: Request) -> bool:
    """Whether the text fits the model's context."""
    return len(request.tokens) <= lm.config.max_length


def summary(grades: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each grade, and its standard error over the texts."""
    found: dict[str, float] = {}
    for name in grades[0] if grades else ():
        values = [grade[name] for grade in grades]
        mean = sum(values) / len(values)
        variance = sum((value - mean)**2 for value in values) / max(len(values) - 1, 1)
        found |= {name: mean, f"{name}_stderr": math.sqrt(variance / len(values))}
    return found
