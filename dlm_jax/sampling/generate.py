"""From requests to canvases, and from traces to samples."""

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.errors import UserError
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params
from dlm_jax.sampling.engine import Canvas, Sampler, Trace, run
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.selector import Confidence, RandomOrder, Selector, Threshold

HOLE = re.compile(r"\[MASK:(\d+)\]")
PLACES = 32  # a canvas is padded to a multiple of this, so that many lengths share one compilation
DEFAULT_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Request:
    """tokens: the whole sequence; masked: which of its places are to be filled; stop: whether the end token ends it."""

    tokens: list[int]
    masked: list[bool]
    stop: bool


@dataclasses.dataclass(frozen=True)
class Sample:
    """A finished sequence, one entry a token; after a committed end token nothing is kept where the request stops.

    order: the step at which a token was committed, from 1; 0 for given ones. confidence: the model's probability of a
    token when it was committed, 0 for given ones. forwards: passes of the model for the whole batch, prefill and
    re-encoding included. text: the sequence as text, empty where there is no tokenizer.
    """

    tokens: list[int]
    order: list[int]
    confidence: list[float]
    forwards: int
    text: str = ""

    def __str__(self) -> str:
        return self.text

    @property
    def new_tokens(self) -> int:
        """How many tokens the sampler wrote."""
        return sum(step > 0 for step in self.order)


def selector(name: str) -> Selector:
    """'confidence', 'random', or 'threshold:0.9'. Raises `UserError` for anything else."""
    kind, _, value = name.partition(":")
    if kind == "threshold":
        try:
            return Threshold(float(value))
        except ValueError:
            raise UserError(f"'{name}' needs a number, such as threshold:0.9") from None
    choices: dict[str, Selector] = {"confidence": Confidence(), "random": RandomOrder()}
    if name not in choices:
        raise UserError(f"'{name}' is not an order of filling; choose confidence, random or threshold:0.9")
    return choices[name]


def continuation(prompt: Sequence[int], max_tokens: int) -> Request:
    """`prompt` and `max_tokens` masked places after it."""
    if max_tokens < 1:
        raise UserError(f"max_tokens must be at least 1, not {max_tokens}")
    return Request([*prompt, *[0] * max_tokens], [*[False] * len(prompt), *[True] * max_tokens], stop=True)


def generate(params: Params, config: ModelConfig, card: Card, requests: Sequence[Request], *, proposal: Proposal,
             select: Selector, steps: int | None = None, seed: int = 0) -> list[Sample]:
    """One sample a request. steps: denoising steps of the stream, or of each block; default: one a token, at most 64.
    Sequence i draws from the key (seed, i), whatever its batch-mates are.

    Raises `UserError` for a request the model cannot serve.
    """
    for request in requests:
        _check(request, config, card)
    if not requests:
        return []
    if steps is not None and steps < 1:
        raise UserError(f"steps must be at least 1, not {steps}")
    all_steps = [steps or card.block_size or min(sum(request.masked), DEFAULT_STEPS) for request in requests]
    sampler = Sampler(jnp.asarray(all_steps, jnp.int32), proposal, select)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), np.arange(len(requests)))
    if not any(request.stop for request in requests):
        card = dataclasses.replace(card, eos_token_id=None)
    trace = jax.device_get(run(params, _canvas(requests, card), keys, sampler, config=config, card=card))
    return [_sample(trace, i, request, card) for i, request in enumerate(requests)]


def check_length(tokens: int, config: ModelConfig) -> None:
    """Raises `UserError` where `tokens` tokens, or more, do not fit the model."""
    if tokens > config.max_length:
        raise UserError(f"the text and its holes take at least {tokens} tokens and the model's context is "
                        f"{config.max_length}; shorten the text or ask for fewer tokens")


def _check(request: Request, config: ModelConfig, card: Card) -> None:
    check_length(len(request.tokens), config)
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


def _canvas(requests: Sequence[Request], card: Card) -> Canvas:
    unit = math.lcm(PLACES, card.block_size or 1)
    n = -(-max(len(request.tokens) for request in requests) // unit) * unit
    tokens, segments = np.zeros((2, len(requests), n), np.int32)
    masked = np.zeros(tokens.shape, bool)
    for i, request in enumerate(requests):
        length = len(request.tokens)
        tokens[i, :length], masked[i, :length], segments[i, :length] = request.tokens, request.masked, 1
    return Canvas(jnp.asarray(tokens), jnp.asarray(masked), jnp.asarray(segments))


def _sample(trace: Trace, i: int, request: Request, card: Card) -> Sample:
    end = len(request.tokens)
    tokens, order = trace.tokens[i, :end], trace.order[i, :end]
    if request.stop and card.eos_token_id is not None:
        ends = np.flatnonzero((tokens == card.eos_token_id) & (order > 0))
        end = int(ends[0]) + 1 if ends.size else end
    return Sample(tokens[:end].tolist(), order[:end].tolist(), trace.confidence[i, :end].tolist(), int(trace.forwards))
