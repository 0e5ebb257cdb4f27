"""Pairs of a prompt and its answer as records: the prompt is given, the answer is learnt."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from dlm_jax.data.inputs import expand
from dlm_jax.data.own_directory import own_directory
from dlm_jax.data.prepare import describe, write_records
from dlm_jax.data.text import checked, json_lines
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.diffusion.corruption import GIVEN
from dlm_jax.errors import UserError

# The names that such files have for their two fields; GSM8K's are the second.
FIELDS = (("prompt", "answer"), ("question", "answer"), ("instruction", "output"))
SEPARATOR = "\n"
SHORTEST = 4  # tokens: start, prompt, answer, end
Layout = Literal["packed", "diffullama"]
Document = tuple[np.ndarray, np.ndarray]  # tokens, and which of them are given: int32 and bool [n]
Record = tuple[np.ndarray, np.ndarray]  # tokens and segments, int32 [length]


def read_pairs(names: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """(prompt, answer) of each line of JSON-lines files; the fields are one of `FIELDS`.

    Raises `UserError` that names the line where they are not, and for files that are not there.
    """
    for name in expand(names):
        for place, record in json_lines(name):
            prompt, answer = next((pair for pair in FIELDS if set(pair) <= record.keys()), FIELDS[0])
            yield checked(record.get(prompt), place, prompt), checked(record.get(answer), place, answer)


def prepare_pairs(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, length: int, out: str | Path,
                  layout: Layout = "packed", progress: Callable[[int], None] = lambda done: None) -> dict:
    """Writes pairs as records of `length` tokens into the new directory `out`, and returns its description.

    A pair is [start] prompt, a line break, answer [end]; all before the answer is given: never masked and never a
    target. 'packed': whole pairs one after the other, each a document of its own, what remains of a record being
    padding. 'diffullama': one pair a record, and the end token fills it, learnt like the answer, so that the model
    knows how long an answer is (arXiv 2410.17891; LLaMA-Factory's `ddm-sft`). A pair that is too long loses the start
    of its prompt, all but its last token, and then the end of its answer.

    Raises `UserError` for a `length` below 4, no pairs at all, and a tokenizer without an end token.
    """
    if length < SHORTEST:
        raise UserError(f"a record of {length} tokens has no room for a prompt and its answer; choose a length of at "
                        f"least {SHORTEST}")
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end token, so a model could not learn where an answer ends; name a model "
                        "that has one")
    counts = {"documents": 0, "bytes": 0}

    def documents() -> Iterator[Document]:
        for prompt, answer in pairs:
            counts["documents"] += 1
            counts["bytes"] += len(prompt.encode()) + len(answer.encode())
            progress(counts["bytes"])
            yield document(prompt, answer, tokenizer, length)

    lay = pack_whole if layout == "packed" else fill_each
    with own_directory(out) as directory:
        written = write_records(lay(documents(), length, tokenizer.eos_id), length, directory, "records")
        return describe([{**counts, **written}], tokenizer, length, directory)


def document(prompt: str, answer: str, tokenizer: Tokenizer, length: int) -> Document:
    """[start] prompt, separator, answer [end], cut to `length` tokens: see `prepare_pairs`."""
    start = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    asked = tokenizer.encode(prompt + SEPARATOR)
    said = [*tokenizer.encode_inside(answer), tokenizer.eos_id][:length - 1 - len(start)]
    asked = asked[max(0, len(start) + len(asked) + len(said) - length):]
    given = len(start) + len(asked)
    return np.array([*start, *asked, *said], np.int32), np.arange(given + len(said)) < given


def pack_whole(documents: Iterable[Document], length: int, eos_id: int) -> Iterator[Record]:
    """Whole documents one after the other; one that does not fit begins the next record."""
    tokens, segments = np.zeros((2, length), np.int32)
    filled = number = 0
    for ids, given in documents:
        if filled + len(ids) > length:
            yield tokens, segments
            tokens, segments = np.zeros((2, length), np.int32)
            filled = number = 0
        number, end = number + 1, filled + len(ids)
        tokens[filled:end], segments[filled:end] = ids, np.where(given, number + GIVEN, number)
        filled = end
    if filled:
        yield tokens, segments


def fill_each(documents: Iterable[Document], length: int, eos_id: int) -> Iterator[Record]:
    """One document a record, followed by end tokens that belong to it."""
    for ids, given in documents:
        tokens, segments = np.full(length, eos_id, np.int32), np.ones(length, np.int32)
        tokens[:len(ids)], segments[:len(ids)] = ids, np.where(given, 1 + GIVEN, 1)
        yield tokens, segments
