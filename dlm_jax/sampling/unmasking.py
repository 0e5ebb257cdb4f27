"""An unmasking strategy is written as a selector, optionally followed by revisions:

    confidence, margin, entropy, left_to_right, random, threshold:0.9, factor:1, entropy_bound:0.5,
    diffullama_random, diffullama_confidence:0.95, speculate:4; and +remask:0.3, +edit:0.9
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

from dlm_jax.diffusion.schedule import cosine, linear
from dlm_jax.errors import UserError
from dlm_jax.sampling import selector
from dlm_jax.sampling.revision import Edit, Remask, Revision
from dlm_jax.sampling.selector import (
    DiffuLLaMAConfidence,
    DiffuLLaMARandom,
    EntropyBound,
    Factor,
    Score,
    Selector,
    Threshold,
    TopScore,
)

MAX_OUTCOMES = 64
SCHEDULES = {"linear": linear, "cosine": cosine}

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Speculate:
    """Not a selector: text is written left to right, exactly as the model's causal half would write it, and diffusion
    only drafts ahead (`speculation.py`)."""

    # For how many outcomes of a verification the next draft is written in the same forward pass, which then computes
    # 1 + outcomes blocks.
    outcomes: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.outcomes <= MAX_OUTCOMES:
            raise UserError(f"speculate drafts for 1 to {MAX_OUTCOMES} outcomes, not for {self.outcomes}")


@dataclasses.dataclass(frozen=True)
class Unmasking:
    """An unmasking strategy."""

    selector: Selector | Speculate  # which masked positions commit their proposal at a step
    revisions: tuple[Revision, ...] = ()  # what later steps may do to committed tokens


def _top_score(score: Score) -> Callable[..., TopScore]:
    return lambda schedule="linear": TopScore(score, SCHEDULES[schedule])


# name: (makes it from the text after the colon, an example)
SELECTORS: dict[str, tuple[Callable[..., Selector | Speculate], str]] = {
    "confidence": (_top_score(selector.confidence), "confidence or confidence:cosine"),
    "margin": (_top_score(selector.margin), "margin or margin:cosine"),
    "entropy": (_top_score(selector.entropy), "entropy or entropy:cosine"),
    "left_to_right": (_top_score(selector.left_to_right), "left_to_right"),
    "random": (_top_score(selector.uniform), "random or random:cosine"),
    "threshold": (lambda tau: Threshold(float(tau)), "threshold:0.9"),
    "factor": (lambda factor: Factor(float(factor)), "factor:1"),
    "entropy_bound": (lambda nats: EntropyBound(float(nats)), "entropy_bound:0.5"),
    "diffullama_random": (lambda: DiffuLLaMARandom(), "diffullama_random"),
    "diffullama_confidence": (lambda temperature="0.95": DiffuLLaMAConfidence(float(temperature)),
                              "diffullama_confidence or diffullama_confidence:0.9"),
    "speculate": (lambda outcomes="1": Speculate(int(outcomes)), "speculate or speculate:4"),
}
REVISIONS: dict[str, tuple[Callable[..., Revision], str]] = {
    "remask": (lambda probability: Remask(float(probability)), "remask:0.3"),
    "edit": (lambda confidence: Edit(float(confidence)), "edit:0.9"),
}


def parse_unmasking(text: str) -> Unmasking:
    """Parses 'threshold:0.9', 'confidence:cosine', 'threshold:0.8+edit:0.9', ... (see `SELECTORS` and `REVISIONS`).

    Raises `UserError` if the text names no unmasking strategy.
    """
    first, *rest = text.split("+")
    chosen = _parse(first, SELECTORS, "an unmasking strategy")
    revisions = tuple(_parse(term, REVISIONS, "a revision") for term in rest)
    if isinstance(chosen, Speculate) and revisions:
        raise UserError(f"'{text}': speculate writes what the causal half would, so nothing can be revised; remove "
                        f"+{rest[0]}")
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
