"""The order of filling, from one short string: a selector, and revisions after a plus sign."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dlm_jax.diffusion.schedule import cosine, linear
from dlm_jax.errors import UserError
from dlm_jax.sampling import selector
from dlm_jax.sampling.revision import Edit, Remask, Revision
from dlm_jax.sampling.selector import Best, DiffuLLaMAConfidence, EntropyBound, Factor, RandomOrder, Selector, Threshold

SCHEDULES = {"linear": linear, "cosine": cosine}


@dataclasses.dataclass(frozen=True)
class Speculate:
    """No order of its own: text is written left to right, exactly as the model's causal half would, and diffusion only
    guesses ahead (`speculation.py`)."""


@dataclasses.dataclass(frozen=True)
class Order:
    """selector: which places commit; revisions: what may happen to them later."""

    selector: Selector | Speculate
    revisions: tuple[Revision, ...] = ()


def _scheduled(score: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name="linear": Best(score, SCHEDULES[name])


# name: (what makes it of its value, an example of it)
TABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "confidence": (_scheduled(selector.confidence), "confidence or confidence:cosine"),
    "margin": (_scheduled(selector.margin), "margin or margin:cosine"),
    "entropy": (_scheduled(selector.entropy), "entropy or entropy:cosine"),
    "left": (_scheduled(selector.left), "left"),
    "random": (lambda name="linear": RandomOrder(SCHEDULES[name]), "random or random:cosine"),
    "threshold": (lambda tau: Threshold(float(tau)), "threshold:0.9"),
    "factor": (lambda factor: Factor(float(factor)), "factor:1"),
    "bound": (lambda nats: EntropyBound(float(nats)), "bound:0.5"),
    "diffullama_random": (RandomOrder, "diffullama_random"),
    "diffullama_confidence": (lambda temperature="0.95": DiffuLLaMAConfidence(float(temperature)),
                              "diffullama_confidence or diffullama_confidence:0.9"),
    "speculate": (Speculate, "speculate"),
}
REVISIONS: dict[str, tuple[Callable[..., Any], str]] = {
    "remask": (lambda least: Remask(float(least)), "remask:0.3"),
    "edit": (lambda most: Edit(float(most)), "edit:0.9"),
}


def parse_order(text: str) -> Order:
    """'threshold:0.9', 'confidence:cosine', 'threshold:0.8+edit:0.9', ... (see `TABLE`). Raises `UserError`."""
    first, *rest = text.split("+")
    chosen, revisions = _make(first, TABLE), tuple(_make(part, REVISIONS) for part in rest)
    if isinstance(chosen, Speculate) and revisions:
        raise UserError(f"'{text}': speculate writes what the causal half would, and nothing can be revised; leave "
                        f"{rest[0]} out")
    return Order(chosen, revisions)


def _make(text: str, table: dict[str, tuple[Callable[..., Any], str]]) -> Any:
    name, colon, value = text.partition(":")
    if name not in table:
        kind = "an order of filling" if table is TABLE else "a revision"
        raise UserError(f"'{text}' is not {kind}; choose one of {', '.join(table)}")
    make, example = table[name]
    try:
        return make(value) if colon else make()
    except (TypeError, ValueError, KeyError):
        raise UserError(f"'{text}' is no order that can be read; write {example}") from None
