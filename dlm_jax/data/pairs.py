"""(prompt, answer) pairs as records: the prompt is conditioned on, the answer is learned."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from dlm_jax.data.inputs import expand
from dlm_jax.data.prepare import write_description, write_records
from dlm_jax.data.records import Record
from dlm_jax.data.text import check_text, json_lines
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import new_directory
from dlm_jax.segments import PROMPT_BIT
from dlm_jax.typing import Bool, Int32

# The field names that such files use; GSM8K's are the second pair.
FIELDS = (("prompt", "answer"), ("question", "answer"), ("instruction", "output"))
SEPARATOR = "\n"
SHORTEST = 4  # tokens: start, prompt, answer, end
Document = tuple[Int32[np.ndarray, " n"], Bool[np.ndarray, " n"]]  # tokens, and which of them are the prompt


def read_pairs(names: Sequence[str | Path]) -> Iterator[tuple[str, str]]:
    """(prompt, answer) from each line of JSON-lines files; the fields are one of the pairs in `FIELDS`.

    Raises `UserError` for a missing file, and for a line without these fields, naming the line.
    """
    for name in expand(names):
        for where, record in json_lines(name):
            prompt, answer = next((pair for pair in FIELDS if set(pair) <= record.keys()), FIELDS[0])
            yield check_text(record.get(prompt), where, prompt), check_text(record.get(answer), where, answer)


def prepare_pairs(pairs: Iterable[tuple[str, str]], tokenizer: Tokenizer, length: int, out: str | Path,
                  end_tokens: int | None = 1, chat: bool = False,
                  progress: Callable[[int], None] = lambda done: None) -> dict:
    """Writes pairs as records of `length` tokens into the new directory `out`, and returns its description.

    A pair is [start] prompt, a line break, answer [end]. Everything before the answer is the prompt: never masked and
    never a target. A pair that is too long loses the start of its prompt, all but the prompt's last token, and then the
    end of its answer. Whole pairs stand one after the other, each its own document; the rest of a record is padding,
    which counts nowhere.

    end_tokens: how many end tokens follow an answer and are learned with it. None: one pair per record, filled up with
    end tokens, so that a model without blocks learns how long an answer is (arXiv 2410.17891; LLaMA-Factory's
    `ddm-sft`). chat: make the prompt the user's turn in the tokenizer's chat format instead.

    Raises `UserError` for a `length` below 4, no pairs at all, and a tokenizer without an end token or, with `chat`,
    without a chat template.
    """
    if length < SHORTEST:
        raise UserError(f"a record of {length} tokens has no room for a prompt and its answer; choose a length of at "
                        f"least {SHORTEST}")
    if tokenizer.eos_id is None:
        raise UserError("the tokenizer has no end token, so a model could not learn where an answer ends; use a model "
                        "that has one")
    if chat and not tokenizer.wrapped.chat_template:
        raise UserError("the tokenizer has no chat template; leave out --apply-chat-template")
    in_format = functools.partial(in_chat_format, tokenizer) if chat else with_line_break
    counts = {"documents": 0, "bytes": 0}

    def documents() -> Iterator[Document]:
        for prompt, answer in pairs:
            counts["documents"] += 1
            counts["bytes"] += len(prompt.encode()) + len(answer.encode())
            progress(counts["bytes"])
            yield encode_pair(in_format(prompt), answer, tokenizer, length, end_tokens or 1)

    records = (fill_with_end_tokens(documents(), length, tokenizer.eos_id) if end_tokens is None
               else pack_documents(documents(), length))
    with new_directory(out) as directory:
        written = write_records(records, length, directory, "records")
        return write_description([{**counts, **written}], tokenizer, length, directory)


def with_line_break(prompt: str) -> str:
    """The plain format of a prompt."""
    return prompt + SEPARATOR


def in_chat_format(tokenizer: Tokenizer, prompt: str) -> str:
    """The prompt as a user's turn, ready for the answer."""
    return tokenizer.wrapped.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                 add_generation_prompt=True)


def encode_pair(prompt: str, answer: str, tokenizer: Tokenizer, length: int, end_tokens: int) -> Document:
    """[start] prompt, answer [end], cut to `length` tokens: see `prepare_pairs`. A prompt that begins with the start
    token, as a chat template may have it, gets no second one."""
    prompt_ids = tokenizer.encode(prompt)
    start = [] if tokenizer.bos_id is None or prompt_ids[:1] == [tokenizer.bos_id] else [tokenizer.bos_id]
    answer_ids = [*tokenizer.encode_inside(answer), *[tokenizer.eos_id] * end_tokens][:length - 1 - len(start)]
    excess = len(start) + len(prompt_ids) + len(answer_ids) - length
    ids = np.array([*start, *prompt_ids[max(0, excess):], *answer_ids], np.int32)
    return ids, np.arange(len(ids)) < len(ids) - len(answer_ids)


def pack_documents(documents: Iterable[Document], length: int) -> Iterator[Record]:
    """Whole documents one after the other; one that does not fit starts the next record."""
    tokens, segments = np.zeros((2, length), np.int32)
    filled = number = 0
    for ids, is_prompt in documents:
        if filled + len(ids) > length:
            yield tokens, segments
            tokens, segments = np.zeros((2, length), np.int32)
            filled = number = 0
        number, end = number + 1, filled + len(ids)
        tokens[filled:end], segments[filled:end] = ids, np.where(is_prompt, number + PROMPT_BIT, number)
        filled = end
    if filled:
        yield tokens, segments


def fill_with_end_tokens(documents: Iterable[Document], length: int, eos_id: int) -> Iterator[Record]:
    """One document per record, followed by end tokens that belong to it."""
    for ids, is_prompt in documents:
        tokens, segments = np.full(length, eos_id, np.int32), np.ones(length, np.int32)
        tokens[:len(ids)], segments[:len(ids)] = ids, np.where(is_prompt, 1 + PROMPT_BIT, 1)
        yield tokens, segments
