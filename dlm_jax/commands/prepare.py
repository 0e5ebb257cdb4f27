"""`dlm prepare`: pack text, or pairs of prompts and answers, into training records."""

import argparse
import shlex
from typing import Any

from dlm_jax.commands.arguments import (
    MODEL_HELP,
    TEXT_FIELD_HELP,
    Arguments,
    available_cores,
    integer_at_least,
    unicode_text,
)
from dlm_jax.commands.progress import byte_progress
from dlm_jax.errors import UserError


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm prepare`."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--text", nargs="+",
                      help="text, JSONL or Parquet: files, patterns, gs:// or s3:// names (text and JSONL also as .gz, "
                           ".bz2, .xz or .zst), or tfds:NAME[:SPLIT]")
    what.add_argument("--pairs", nargs="+",
                      help="JSONL of prompts and answers (prompt, answer; question, answer; or instruction, output)")
    parser.add_argument("--text-field", type=unicode_text, metavar="NAME", help=TEXT_FIELD_HELP)
    parser.add_argument("--end-tokens", type=end_tokens, metavar="N",
                        help="for --pairs: end tokens that follow an answer and count in the loss (default 1), or all: "
                             "one pair per record, filled with them, as DiffuLLaMA does")
    parser.add_argument("--apply-chat-template", action="store_true",
                        help="for --pairs: the prompt as a user's turn in the tokenizer's chat format; otherwise a "
                             "line break follows it")
    parser.add_argument("--model", required=True, help="whose tokenizer to use: " + MODEL_HELP)
    parser.add_argument("--length", required=True, type=integer_at_least(2), help="tokens per record")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--processes", type=integer_at_least(1), metavar="N",
                     help="tokenizer processes (default: one per core); the files do not depend on it")
    how.add_argument("--beam", metavar="FLAGS",
                     help="run as an Apache Beam pipeline with these flags, as in --beam='--runner=DirectRunner'")
    parser.add_argument("--out", required=True, help="new directory")


def end_tokens(text: str) -> int | str:
    """An argument type: a number of at least 1, or all."""
    return text if text == "all" else integer_at_least(1)(text)


def run(a: Arguments) -> dict[str, Any]:
    """Prepares; returns what was written."""
    from dlm_jax.data.inputs import expand
    from dlm_jax.files import check_new
    from dlm_jax.loading import load_bundle, load_tokenizer
    check_new(a.out)
    names = expand(a.text or a.pairs)
    tokenizer = load_tokenizer(load_bundle(a.model))
    if tokenizer is None:
        raise UserError(f"{a.model} has no tokenizer files; name a model that has")
    description = pack_pairs(a, names, tokenizer) if a.pairs else pack_text(a, names, tokenizer)
    keys = ("records", "length", "tokens", "documents", "bytes")
    return {"out": str(a.out), **{key: description[key] for key in keys}}


def pack_pairs(a: Arguments, names: list[str], tokenizer: Any) -> dict[str, Any]:
    """The description of the records made from --pairs."""
    from dlm_jax.data.pairs import prepare_pairs, read_pairs
    if a.beam is not None or a.processes is not None:
        raise UserError("pairs are prepared by one process; leave out --beam and --processes")
    if a.text_field is not None:
        raise UserError("--text-field is for --text; leave it out")
    with byte_progress("prepared") as progress:
        count = None if a.end_tokens == "all" else a.end_tokens or 1
        return prepare_pairs(read_pairs(names), tokenizer, a.length, a.out, count, a.apply_chat_template, progress)


def pack_text(a: Arguments, names: list[str], tokenizer: Any) -> dict[str, Any]:
    """The description of the records made from --text."""
    if a.end_tokens is not None or a.apply_chat_template:
        raise UserError("--end-tokens and --apply-chat-template are for --pairs; leave them out")
    field = a.text_field or "text"
    if a.beam is not None:
        from dlm_jax.data.beam import prepare_with_beam
        return prepare_with_beam(names, tokenizer, a.length, a.out, shlex.split(a.beam), field)
    from dlm_jax.data.prepare import prepare
    from dlm_jax.data.text import read_documents
    with byte_progress("prepared") as progress:
        return prepare(read_documents(names, field), tokenizer, a.length, a.out, progress,
                       a.processes or available_cores())
