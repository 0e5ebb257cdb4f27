"""Selectors: which of the masked places commit their proposal at a step.

Each is called as selector(keys [b], confidence [b, n], masked [b, n], steps_left [b, 1]) -> bool [b, n], a part of
`masked`.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError


class Selector(Protocol):
    """`steps_left` counts this step too and stays at 1 once the steps are used up. The sampler goes on until nothing is
    masked, so at 1 something of every sequence must commit."""

    def __call__(self, keys: jax.Array, confidence: jax.Array, masked: jax.Array, steps_left: jax.Array) -> jax.Array:
        ...


@dataclasses.dataclass(frozen=True)
class RandomOrder:
    """Ancestral sampling of the masked diffusion: each place by itself, with probability 1 / steps_left.

    That is (alpha_s - alpha_t) / (1 - alpha_t) on an even grid of the linear schedule (DiffuLLaMA, algorithm 2).
    """

    def __call__(self, keys: jax.Array, confidence: jax.Array, masked: jax.Array, steps_left: jax.Array) -> jax.Array:
        u = jax.vmap(lambda key: jax.random.uniform(key, confidence.shape[1:]))(keys)
        return masked & (u < 1.0 / steps_left)


@dataclasses.dataclass(frozen=True)
class Confidence:
    """The most confident places, as many as finish in the steps that are left (MaskGIT, arXiv 2202.04200)."""

    def __call__(self, keys: jax.Array, confidence: jax.Array, masked: jax.Array, steps_left: jax.Array) -> jax.Array:
        count = jnp.sum(masked, -1, keepdims=True)
        quota = -(-count // steps_left)
        return masked & (confidence_rank(confidence, masked) < quota)


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every place whose confidence exceeds tau, and at least the most confident one, in as many steps as that takes
    (Fast-dLLM, arXiv 2505.22618)."""

    tau: float

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UserError(f"the threshold must lie in [0, 1], not {self.tau}")

    def __call__(self, keys: jax.Array, confidence: jax.Array, masked: jax.Array, steps_left: jax.Array) -> jax.Array:
        return masked & ((confidence > self.tau) | (confidence_rank(confidence, masked) == 0))


def confidence_rank(confidence: jax.Array, masked: jax.Array) -> jax.Array:
    """0 for the most confident masked place of a sequence, 1 for the next, ...; ties by place: int [b, n].

    Masked places come before all others even where a broken model's confidence is not a number.
    """
    order = jnp.argsort(jnp.where(masked, -jnp.nan_to_num(confidence), jnp.inf), -1)  # stable
    return jnp.argsort(order, -1)
