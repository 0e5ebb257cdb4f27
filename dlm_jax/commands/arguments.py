"""Argument types and groups of flags that several commands share."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from dlm_jax.errors import UserError

Arguments = argparse.Namespace
MAX_STDIN = 2**27  # bytes of a text that is read from stdin
CONFIG_HELP = "a config file, or a name that `dlm configs` lists, such as tiny"
MODEL_HELP = "a native, work or Hugging Face directory, a hub id, or 'bundled'"
TEXT_FIELD_HELP = "the field, column or feature that holds the text of JSONL, Parquet and tfds: inputs (default: text)"
UNMASKING_HELP = ("which tokens to commit at each step: confidence (default), margin, entropy, random (each also as "
                  "confidence:cosine), left_to_right, threshold:0.9 (every token above this confidence), factor:1, "
                  "frechet, entropy_bound:0.5, speculate:4, jacobi:16, diffullama_random, diffullama_confidence:0.95; "
                  "append +remask:0.3 or +edit:0.9 to revise committed tokens")


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a mistake in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see `{self.prog} --help`")


def add_sampling_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `sample` and `infill` share."""
    add_decoding_flags(parser)
    add_seed_flag(parser)
    parser.add_argument("--watch", action="store_true", help="show the denoising in the terminal")
    parser.add_argument("--gif", metavar="FILE", help="draw the denoising as a GIF")
    parser.add_argument("--html", metavar="FILE", help="write a page with a slider through the denoising")


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """How a text is decoded: a flag for each field of the sampler's `Settings` but the seed."""
    parser.add_argument("--steps", type=integer_at_least(1), metavar="N",
                        help="denoising steps for the text, shared by its blocks (default: one per token)")
    parser.add_argument("--unmasking", default="confidence", metavar="STRATEGY", help=UNMASKING_HELP)
    add_draw_flags(parser, temperature=0.0)
    parser.add_argument("--block", type=integer_at_least(1), metavar="N",
                        help="finish N positions, counted from the first hole, before the next N begin (for models "
                             "without blocks of their own)")
    parser.add_argument("--cache", help="none, block (exact, for block-causal models), prefix or dual (approximate, "
                                        "for bidirectional models, with --block)")
    parser.add_argument("--cfg-scale", type=float, default=0.0, metavar="X",
                        help="classifier-free guidance, at twice the forward passes (default 0: none)")
    parser.add_argument("--suppress-tokens", type=token_ids, default=(), metavar="ID,ID,...",
                        help="ids that are never written")


def add_draw_flags(parser: argparse.ArgumentParser, temperature: float) -> None:
    """How a token is drawn from the model's distribution."""
    parser.add_argument("--temperature", type=float, default=temperature, metavar="X",
                        help=f"sampling temperature (default {temperature}); 0 takes the most likely token")
    parser.add_argument("--top-k", type=integer_at_least(0), default=0, metavar="N",
                        help="draw from the N most likely tokens (default 0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P",
                        help="draw from the most likely tokens whose probabilities sum to P (default 1: all)")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="P",
                        help="draw from tokens at least P times as likely as the most likely one (default 0: all)")


def add_tensor_flag(parser: argparse.ArgumentParser) -> None:
    """How many devices hold the weights together."""
    parser.add_argument("--tensor", type=integer_at_least(1), default=1, metavar="N",
                        help="devices of this host that hold the weights together, where one cannot (default 1)")


def add_fsdp_flag(parser: argparse.ArgumentParser) -> None:
    """How many devices gather the weights from each other."""
    parser.add_argument("--fsdp", type=integer_at_least(1), default=1, metavar="N",
                        help="the same for large batches: devices of this host that have texts of their own and gather "
                             "the weights of each layer from each other (default 1)")


def add_seed_flag(parser: argparse.ArgumentParser) -> None:
    """The seed of all draws."""
    parser.add_argument("--seed", type=integer_at_least(0), default=0, metavar="N", help="random seed (default 0)")


def integer_at_least(least: int) -> Callable[[str], int]:
    """An argument type: a whole number of at least `least`."""
    def number(text: str) -> int:
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of at least {least}")
        return int(text)

    return number


def token_ids(text: str) -> tuple[int, ...]:
    """An argument type: token ids, separated by commas."""
    ids = text.split(",")
    if not all(id.strip().isdecimal() and len(id) < 10 for id in ids):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of token ids such as 0,13")
    return tuple(int(id) for id in ids)


def step_range(text: str) -> tuple[int, int]:
    """An argument type: FIRST:LAST, two step numbers."""
    first, colon, last = text.partition(":")
    if not colon or not first.isdecimal() or not last.isdecimal() or not 1 <= int(first) <= int(last):
        raise argparse.ArgumentTypeError(f"'{text}' is not of the form FIRST:LAST, such as 10:12")
    return int(first), int(last)


def unicode_text(text: str) -> str:
    """An argument type: text to tokenize. What a shell passes on need not be UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("the text is not UTF-8") from None
    return text


def text_or_stdin(text: str) -> str:
    """An argument type: text, or for '-' what stdin holds, without the line break that ends it."""
    if text != "-":
        return unicode_text(text)
    try:
        return stdin_bytes().decode().removesuffix("\n")
    except UnicodeDecodeError:
        raise UserError("the text on stdin is not UTF-8; write it as UTF-8") from None


def stdin_bytes() -> bytes:
    """What stdin holds. Raises `UserError` for more than MAX_STDIN bytes."""
    read = sys.stdin.buffer.read(MAX_STDIN + 1)
    if len(read) > MAX_STDIN:
        raise UserError(f"the text on stdin is longer than {MAX_STDIN} bytes; write it to a file")
    return read


def take_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates '--config.a.b=value' arguments, returned second as 'a.b=value', from the others."""
    prefix = "--config."
    overrides = [x.removeprefix(prefix) for x in arguments if x.startswith(prefix)]
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{prefix}{override} has no value; write {prefix}{override}=VALUE")
    return [x for x in arguments if not x.startswith(prefix)], overrides


def available_cores() -> int:
    """How many processes can run at once on this machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
