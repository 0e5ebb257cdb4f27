"""The documents of the tasks beside this file, from the files that their authors publish.

Each function gets `data`, a folder, from `dlm eval --data DIR` or `lm_eval --metadata data=DIR`. The files lie in it,
or in its folder named after the function.
"""

from collections.abc import Iterable
from typing import Any

from datasets import Dataset

from dlm_jax.data.text import json_lines, numbered_lines
from dlm_jax.errors import UserError
from dlm_jax.harness.data_files import TRIVIAQA_FILE, find, trivia_questions

Documents = dict[str, Dataset]  # by split


def lambada(data: str | None = None, **_: Any) -> Documents:
    """`lambada_test_plain_text.txt`, one passage per line (Paperno et al. 2016)."""
    return as_test_split({"text": line} for line in lines(data, "lambada", "lambada_test_plain_text.txt"))


def hellaswag(data: str | None = None, **_: Any) -> Documents:
    """`hellaswag_val_full.txt`, as prepared for llama.cpp: six lines per question, the context, the right ending's
    number and four endings (Zellers et al. 2019)."""
    rows = lines(data, "hellaswag", "hellaswag_val_full.txt", "hellaswag_val_full.txt.bz2")
    return as_test_split({"query": rows[i], "label": int(rows[i + 1]), "choices": rows[i + 2:i + 6]}
                      for i in range(0, len(rows) - 5, 6))


def piqa(data: str | None = None, **_: Any) -> Documents:
    """`valid.jsonl` and `valid-labels.lst` (Bisk et al. 2020)."""
    return labelled(data, "piqa", "valid.jsonl", "valid-labels.lst")


def siqa(data: str | None = None, **_: Any) -> Documents:
    """`dev.jsonl` and `dev-labels.lst` (Sap et al. 2019)."""
    return labelled(data, "siqa", "dev.jsonl", "dev-labels.lst")


def winogrande(data: str | None = None, **_: Any) -> Documents:
    """`dev.jsonl`, with its answers inside (Sakaguchi et al. 2020)."""
    return as_test_split(objects(data, "winogrande", "dev.jsonl"))


def gsm8k(data: str | None = None, **_: Any) -> Documents:
    """`test.jsonl`, and `train.jsonl` for examples in the prompt (Cobbe et al. 2021)."""
    return {split: Dataset.from_list(objects(data, "gsm8k", f"{split}.jsonl")) for split in ("train", "test")}


def countdown(data: str | None = None, **_: Any) -> Documents:
    """`cd3_test.jsonl`, `cd4_test.jsonl` or `cd5_test.jsonl` of Dream, whichever is there first."""
    names = (f"cd{numbers}_test.jsonl" for numbers in (3, 4, 5))
    return as_test_split(objects(data, "countdown", *names))


def sudoku(data: str | None = None, **_: Any) -> Documents:
    """`sudoku.jsonl`: {"input": GRID} with a row per line and 0 for an open cell, and {"output": GRID} for examples in
    the prompt, as Dream has its grids of 4 by 4."""
    return as_test_split(objects(data, "sudoku", "sudoku.jsonl"))


def triviaqa(data: str | None = None, **_: Any) -> Documents:
    """`wikipedia-dev.json` of triviaqa-rc, without its texts (Joshi et al. 2017)."""
    questions = trivia_questions(find(data, "triviaqa", TRIVIAQA_FILE))
    return as_test_split({"question": each.question, "aliases": list(each.accepted)} for each in questions)


def labelled(data: str | None, task: str, questions: str, labels: str) -> Documents:
    """Questions with their labels from a file beside them."""
    asked, answers = objects(data, task, questions), lines(data, task, labels)
    if len(asked) != len(answers) or not all(map(str.isdecimal, answers)):
        raise UserError(f"{labels} of {task} must have a number for each of the {len(asked)} questions; take both "
                        "files from one release")
    return as_test_split(question | {"label": int(label)} for question, label in zip(asked, answers))


def as_test_split(documents: Iterable[dict]) -> Documents:
    """The documents as a split named test."""
    return {"test": Dataset.from_list(list(documents))}


def objects(data: str | None, task: str, *names: str) -> list[dict]:
    """The JSON object on each line of the first of these files that there is."""
    return [fields for _, fields in json_lines(str(find(data, task, *names)))]


def lines(data: str | None, task: str, *names: str) -> list[str]:
    """The lines, but for empty ones, of the first of these files that there is."""
    stripped = (line.rstrip("\r\n") for _, line in numbered_lines(str(find(data, task, *names))))
    return [line for line in stripped if line]
