"""Requests: a prompt with positions to fill, and which of them a model cannot serve."""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Sequence

from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec

HOLE = re.compile(r"\[MASK:([0-9]+)(?:-([0-9]+))?\]")
MAX_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """One sequence to fill. The positions that are not masked are the prompt, wherever they are."""

    tokens: list[int]  # the full sequence; ignored at masked positions
    masked: list[bool]  # the positions to fill
    stop: bool  # whether the end token ends the sequence


def continuation(prompt: Sequence[int], max_tokens: int) -> Request:
    """`prompt`, followed by `max_tokens` masked positions."""
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    return Request([*prompt, *[0] * max_tokens], [*[False] * len(prompt), *[True] * max_tokens], stop=True)


def with_holes(text: str, encode: Callable[[str], list[int]], encode_inside: Callable[[str], list[int]],
               context: int) -> list[Request]:
    """Parses 'text with [MASK:8] holes': one request, or one per choice of widths for holes such as [MASK:3-8].

    encode, encode_inside: tokenize the start of a text, and text after a hole. Raises `UserError` if there is no hole,
    or if the holes are too long or allow too many choices.
    """
    parts = HOLE.split(text)  # text, width, last width or None, text, ...
    ranges = [range(_width(a), _width(b or a) + 1) for a, b in zip(parts[1::3], parts[2::3])]
    if not ranges:
        raise UserError("there is no hole to fill; mark one with [MASK:n], n tokens wide")
    for widths in ranges:
        if not widths:
            raise UserError(f"the hole [MASK:{widths.start}-{widths.stop - 1}] has a minimum width above its maximum; "
                            "write the smaller width first")
    check_length(sum(widths[-1] for widths in ranges), context)
    count = 1
    for widths in ranges:
        count *= len(widths)
    if count > MAX_CANDIDATES:
        raise UserError(f"the holes allow {count} choices of widths and at most {MAX_CANDIDATES} are tried; narrow "
                        "their ranges")
    ids = [encode(parts[0]), *(encode_inside(after) for after in parts[3::3])]
    return [_request(ids, widths) for widths in itertools.product(*ranges)]


def _width(digits: str) -> int:
    """The number, if it has at most ten digits, and else one of ten digits, which no context has room for either."""
    return int(digits.lstrip("0")[:10] or "0")


def _request(ids: list[list[int]], widths: Sequence[int]) -> Request:
    tokens, masked = list(ids[0]), [False] * len(ids[0])
    for width, after in zip(widths, ids[1:]):
        tokens += [0] * width + after
        masked += [True] * width + [False] * len(after)
    return Request(tokens, masked, stop=False)


def check_length(tokens: int, context: int) -> None:
    """Raises `UserError` if this many tokens do not fit the model's context."""
    if tokens > context:
        raise UserError(f"the text and its holes take at least {tokens} tokens and the model's context is "
                        f"{context}; shorten the text or ask for fewer tokens")


def check(request: Request, config: ModelConfig, spec: DiffusionSpec) -> None:
    """Raises `UserError` if the model cannot serve the request."""
    check_length(len(request.tokens), config.max_length)
    if not any(request.masked):
        raise UserError("there is no hole to fill; mark one with [MASK:n], n tokens wide")
    if spec.alignment == "shifted" and request.masked[0]:
        raise UserError("this model predicts each token from the one before it, and nothing comes before the first; "
                        "put a token before the hole")
    if spec.is_diffusion and spec.mask_token_id is None:
        raise UserError("the model's spec names no mask token; name it with --mask when you import the model")
    prompt = [token for token, hole in zip(request.tokens, request.masked) if not hole]
    if spec.mask_token_id is not None and spec.mask_token_id in prompt:
        raise UserError("the text contains the mask token itself; mark holes with [MASK:n]")
    if any(not 0 <= token < config.vocab_size for token in request.tokens):
        raise UserError(f"a token id is outside the vocabulary of {config.vocab_size}; use ids from 0 to "
                        f"{config.vocab_size - 1}")


def check_suppressed(tokens: Sequence[int], config: ModelConfig) -> None:
    """Raises `UserError` unless some token of the vocabulary can still be written."""
    if any(not 0 <= token < config.vocab_size for token in tokens):
        raise UserError(f"suppress_tokens must be ids from 0 to {config.vocab_size - 1}, not {list(tokens)}")
    if len(set(tokens)) >= config.vocab_size - 1:
        raise UserError("suppress_tokens leaves no token to write; suppress fewer")


def check_left_to_right(request: Request) -> None:
    """Raises `UserError` unless the only hole is at the end, after at least one token."""
    first = request.masked.index(True)
    if first == 0 or not all(request.masked[first:]):
        raise UserError("left to right, the only hole must be at the end of the text, after at least one token; choose "
                        "another unmasking strategy")


def in_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of requests in batches of at most `batch_size`, similar lengths together, short ones first."""
    ordered = sorted(range(len(lengths)), key=lambda i: (lengths[i], i))
    for start in range(0, len(ordered), batch_size):
        yield ordered[start:start + batch_size]
