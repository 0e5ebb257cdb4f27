"""Requests: what is given and what is to be filled, and which of them a model cannot serve."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from dlm_jax.errors import UserError
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig

HOLE = re.compile(r"\[MASK:(\d+)(?:-(\d+))?\]")
MOST_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """tokens: the whole sequence; masked: which of its places are to be filled; stop: whether the end token ends it."""

    tokens: list[int]
    masked: list[bool]
    stop: bool


def continuation(prompt: Sequence[int], max_tokens: int) -> Request:
    """`prompt` and `max_tokens` masked places after it."""
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    return Request([*prompt, *[0] * max_tokens], [*[False] * len(prompt), *[True] * max_tokens], stop=True)


def with_holes(text: str, encode: Callable[[str], list[int]], encode_inside: Callable[[str], list[int]],
               context: int) -> list[Request]:
    """'text with [MASK:8] holes' as given and masked places: one request for each choice of widths, where a hole is of
    unknown width, [MASK:3-8]. Raises `UserError` where there is none, or where they are too many or too long."""
    parts = HOLE.split(text)  # text, width, last width or None, text, ...
    ranges = [range(int(a), int(b or a) + 1) for a, b in zip(parts[1::3], parts[2::3])]
    if not ranges:
        raise UserError("there is no hole to fill; mark one with [MASK:n], n tokens wide")
    for a, b, widths in zip(parts[1::3], parts[2::3], ranges):
        if not widths:
            raise UserError(f"the hole [MASK:{a}-{b}] ends before it begins; write the smaller width first")
    check_length(sum(widths[-1] for widths in ranges), context)
    count = 1
    for widths in ranges:
        count *= len(widths)
    if count > MOST_CANDIDATES:
        raise UserError(f"the ranges of the holes make {count} choices of widths and at most {MOST_CANDIDATES} are "
                        "tried; narrow them")
    ids = [encode(parts[0]), *(encode_inside(after) for after in parts[3::3])]
    return [_request(ids, widths) for widths in itertools.product(*ranges)]


def _request(ids: list[list[int]], widths: Sequence[int]) -> Request:
    tokens, masked = list(ids[0]), [False] * len(ids[0])
    for width, after in zip(widths, ids[1:]):
        tokens += [0] * width + after
        masked += [True] * width + [False] * len(after)
    return Request(tokens, masked, stop=False)


def check_length(tokens: int, context: int) -> None:
    """Raises `UserError` where `tokens` tokens, or more, do not fit the model's context."""
    if tokens > context:
        raise UserError(f"the text and its holes take at least {tokens} tokens and the model's context is "
                        f"{context}; shorten the text or ask for fewer tokens")


def check(request: Request, config: ModelConfig, card: Card) -> None:
    """Raises `UserError` for a request that the model cannot serve."""
    check_length(len(request.tokens), config.max_length)
    if not any(request.masked):
        raise UserError("there is no hole to fill; mark one with [MASK:n], n tokens wide")
    if card.alignment == "shifted" and request.masked[0]:
        raise UserError("this model predicts a token from the one before it and there is none before the first; put a "
                        "token before the hole")
    if card.is_diffusion and card.mask_token_id is None:
        raise UserError("the model's card names no mask token; name it when the model is imported, with --mask")
    given = [token for token, hole in zip(request.tokens, request.masked) if not hole]
    if card.mask_token_id is not None and card.mask_token_id in given:
        raise UserError("the text holds the mask token itself; mark holes with [MASK:n]")
    if any(not 0 <= token < config.vocab_size for token in request.tokens):
        raise UserError(f"a token id lies outside the vocabulary of {config.vocab_size}")


def check_left_to_right(request: Request) -> None:
    """Raises `UserError` where something given stands after a hole."""
    first = request.masked.index(True)
    if first == 0 or not all(request.masked[first:]):
        raise UserError("text that is written left to right has its one hole at the end, after at least one token; "
                        "fill this one in another order")


def in_batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers of requests, at most `most` together, of like length, short ones first."""
    ordered = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(ordered), most):
        yield ordered[start:start + most]
