"""An unmasking strategy is written as a selector, optionally followed by revisions:

    confidence, margin, entropy, left_to_right, random, threshold:0.9, factor:1, frechet,
    entropy_bound:0.5, diffullama_random, diffullama_confidence:0.95, speculate:4, jacobi:16; and +remask:0.3, +edit:0.9
"""

import math
from collections.abc import Callable
from typing import TypeVar

from dlm_jax import struct
from dlm_jax.diffusion.schedule import cosine, linear
from dlm_jax.errors import UserError
from dlm_jax.sampling import selector
from dlm_jax.sampling.revision import Edit, Remask, Revision
from dlm_jax.sampling.selector import (
    DiffuLLaMAConfidence,
    DiffuLLaMARandom,
    EntropyBound,
    Factor,
    Frechet,
    Score,
    Selector,
    Threshold,
    TopScore,
)

MAX_OUTCOMES = 64
MAX_WINDOW = 512
SCHEDULES = {"linear": linear, "cosine": cosine}

T = TypeVar("T")


@struct.dataclass
class Speculate:
    """Not a selector: text is written left to right, exactly as the model's causal half would write it, and diffusion
    only drafts ahead (`speculation.py`)."""

    # For how many outcomes of a verification the next draft is written in the same forward pass, which then computes
    # 1 + outcomes blocks.
    outcomes: int = struct.field(pytree_node=False, default=1)

    def __post_init__(self) -> None:
        if not 1 <= self.outcomes <= MAX_OUTCOMES:
            raise UserError(f"speculate drafts for 1 to {MAX_OUTCOMES} outcomes, not for {self.outcomes}")


@struct.dataclass
class Jacobi(Speculate):
    """The same, where a model without diffusion drafts by what it has said to its last draft (arXiv 2305.10427)."""

    window: int = struct.field(pytree_node=False, default=16)  # tokens of a forward pass

    def __post_init__(self) -> None:
        if not 2 <= self.window <= MAX_WINDOW:
            raise UserError(f"jacobi has a window of 2 to {MAX_WINDOW} tokens, not of {self.window}")


@struct.dataclass
class Unmasking:
    """An unmasking strategy."""

    selector: Selector | Speculate  # which masked positions commit their proposal at a step
    revisions: tuple[Revision, ...] = ()  # what later steps may do to committed tokens


def _number(text: str, what: str, *, low: float = 0.0, high: float = math.inf, above: bool = False) -> float:
    """The number in `text`. Raises `UserError` unless it lies in [low, high], or above `low` if `above`."""
    value = float(text)
    if not low <= value <= high or (above and value == low):
        bounds = f"lie in [{low:g}, {high:g}]" if high < math.inf else "be positive" if above else "not be negative"
        raise UserError(f"{what} must {bounds}, not {value}")
    return value


def _top_score(score: Score) -> Callable[..., TopScore]:
    return lambda schedule="linear": TopScore(score, SCHEDULES[schedule])


# name: (makes it from the text after the colon, an example)
SELECTORS: dict[str, tuple[Callable[..., Selector | Speculate], str]] = {
    "confidence": (_top_score(selector.confidence), "confidence or confidence:cosine"),
    "margin": (_top_score(selector.margin), "margin or margin:cosine"),
    "entropy": (_top_score(selector.entropy), "entropy or entropy:cosine"),
    "left_to_right": (_top_score(selector.left_to_right), "left_to_right"),
    "random": (_top_score(selector.uniform), "random or random:cosine"),
    "threshold": (lambda tau: Threshold(_number(tau, "the threshold", high=1)), "threshold:0.9"),
    "factor": (lambda factor: Factor(_number(factor, "the factor", above=True)), "factor:1"),
    "frechet": (lambda margin="0": Frechet(_number(margin, "the margin")), "frechet or frechet:0.1"),
    "entropy_bound": (lambda nats: EntropyBound(_number(nats, "the entropy bound")), "entropy_bound:0.5"),
    "diffullama_random": (lambda: DiffuLLaMARandom(), "diffullama_random"),
    "diffullama_confidence": (lambda temperature="0.95": DiffuLLaMAConfidence(
        _number(temperature, "the temperature of the scores", above=True)),
                              "diffullama_confidence or diffullama_confidence:0.9"),
    "speculate": (lambda outcomes="1": Speculate(int(outcomes)), "speculate or speculate:4"),
    "jacobi": (lambda window="16": Jacobi(window=int(window)), "jacobi or jacobi:32"),
}
REVISIONS: dict[str, tuple[Callable[..., Revision], str]] = {
    "remask": (lambda probability: Remask(_number(probability, "the probability of remask", high=1)), "remask:0.3"),
    "edit": (lambda confidence: Edit(_number(confidence, "the confidence of edit", high=1)), "edit:0.9"),
}


def parse_unmasking(text: str) -> Unmasking:
    """Parses 'threshold:0.9', 'confidence:cosine', 'threshold:0.8+edit:0.9', ... (see `SELECTORS` and `REVISIONS`).

    Raises `UserError` if the text names no unmasking strategy.
    """
    first, *rest = text.split("+")
    chosen = _parse(first, SELECTORS, "an unmasking strategy")
    revisions = tuple(_parse(term, REVISIONS, "a revision") for term in rest)
    if isinstance(chosen, Speculate) and revisions:
        raise UserError(f"'{text}': {first} writes what the model would left to right, so nothing can be revised; "
                        f"remove +{rest[0]}")
    return Unmasking(chosen, revisions)


def _parse(text: str, table: dict[str, tuple[Callable[..., T], str]], kind: str) -> T:
    name, colon, value = text.partition(":")
    if name not in table:
        raise UserError(f"'{text}' is not {kind}; choose one of {', '.join(table)}")
    make, example = table[name]
    try:
        return make(value) if colon else make()
    except (TypeError, ValueError, KeyError):
        raise UserError(f"'{text}' is not {kind} that can be parsed; write {example}") from None
