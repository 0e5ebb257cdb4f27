"""Revisions: what a step may do to tokens that were committed before it, while their block is still in work."""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError
from dlm_jax.sampling.selector import View


class Revision(Protocol):
    """`masks`: whether the places it changes are masked again; else they take another token."""

    masks: bool

    def __hash__(self) -> int:
        ...

    def __call__(self, tokens: jax.Array, view: View) -> jax.Array:
        """The places of `tokens` [b, n] that it would change, bool [b, n]."""
        ...


@dataclasses.dataclass(frozen=True)
class Remask:
    """Masks a token again whose probability, with what is now around it, is below `least`. Each place once, so that
    the sampler comes to an end."""

    least: float
    masks = True

    def __post_init__(self) -> None:
        if not 0 <= self.least <= 1:
            raise UserError(f"remask needs a probability in [0, 1], not {self.least}")

    def __call__(self, tokens: jax.Array, view: View) -> jax.Array:
        logits = jnp.take_along_axis(view.logits, tokens[..., None], -1)[..., 0]
        return jnp.exp(logits - jax.nn.logsumexp(view.logits, -1)) < self.least


@dataclasses.dataclass(frozen=True)
class Edit:
    """Puts the proposal in the place of a token where the model is now surer than `most` of another one (LLaDA 2.1)."""

    most: float
    masks = False

    def __post_init__(self) -> None:
        if not 0 <= self.most <= 1:
            raise UserError(f"edit needs a probability in [0, 1], not {self.most}")

    def __call__(self, tokens: jax.Array, view: View) -> jax.Array:
        return (view.tokens != tokens) & (view.confidence > self.most)
