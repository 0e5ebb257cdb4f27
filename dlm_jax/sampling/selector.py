"""Selectors: which of the masked places commit their proposal at a step.

Each is a frozen object called as selector(view) -> bool [b, n], a part of `view.masked`. The sampler goes on until
nothing is masked, so something of every sequence must commit, at the latest where one step is left.
"""

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.diffusion.schedule import linear
from dlm_jax.errors import UserError

Schedule = Callable[[jax.Array], jax.Array]


@struct.dataclass
class View:
    """The places in work, as a step sees them. b sequences, n places, v vocabulary.

    keys: [b]; logits: fp32 [b, n, v]; tokens: int [b, n], the proposals, at all places; confidence: fp32 [b, n], the
    model's probability of each; masked: bool [b, n]; canvas: bool [b, n], the places that were masked at the start;
    steps, steps_left: int [b, 1], in all, and this one included; the second stays at 1 once they are used up.
    """

    keys: jax.Array
    logits: jax.Array
    tokens: jax.Array
    confidence: jax.Array
    masked: jax.Array
    canvas: jax.Array
    steps: jax.Array
    steps_left: jax.Array


class Selector(Protocol):
    """What every selector offers."""

    def __hash__(self) -> int:
        ...

    def __call__(self, view: View) -> jax.Array:
        ...


def share(schedule: Schedule, view: View) -> jax.Array:
    """(alpha_s - alpha_t) / (1 - alpha_t): the share of what is masked that this step reveals, fp32 [b, 1]; 1 / steps
    left on the linear schedule, and always 1 at the last step."""
    made = view.steps - view.steps_left
    now, then = schedule(made / view.steps), schedule((made + 1) / view.steps)
    return jnp.where(view.steps_left == 1, 1.0, (now - then) / jnp.maximum(now, 1e-9))


@dataclasses.dataclass(frozen=True)
class RandomOrder:
    """Ancestral sampling of the masked diffusion: each place by itself, with the probability `share`.

    On the linear schedule that is 1 / (t + 1) for t = T-1 .. 1 and then the rest (DiffuLLaMA, algorithm 2).
    """

    schedule: Schedule = linear

    def __call__(self, view: View) -> jax.Array:
        u = jax.vmap(lambda key: jax.random.uniform(key, view.masked.shape[1:]))(view.keys)
        return view.masked & (u < share(self.schedule, view))


def confidence(view: View) -> jax.Array:
    """The probability of the proposal (MaskGIT, arXiv 2202.04200)."""
    return view.confidence


def margin(view: View) -> jax.Array:
    """How far the likeliest token is ahead of the next (Kim et al., arXiv 2502.06768)."""
    top, _ = jax.lax.top_k(jax.nn.softmax(view.logits, -1), 2)
    return top[..., 0] - top[..., 1]


def entropy(view: View) -> jax.Array:
    """Minus the entropy of a place in nats (Dream's order)."""
    log_p = jax.nn.log_softmax(view.logits, -1)
    return jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), -1)


def left(view: View) -> jax.Array:
    """Earlier places first."""
    return jnp.broadcast_to(-jnp.arange(view.masked.shape[1], dtype=jnp.float32), view.masked.shape)


@dataclasses.dataclass(frozen=True)
class Best:
    """The places that score highest, as many as the schedule asks for and at least one; all in the steps given."""

    score: Callable[[View], jax.Array] = confidence
    schedule: Schedule = linear

    def __call__(self, view: View) -> jax.Array:
        count = jnp.sum(view.masked, -1, keepdims=True)
        quota = jnp.ceil(count * share(self.schedule, view) - 1e-4)  # 9 of 27 are 9, whatever 27 * fp32(1/3) is
        return view.masked & (rank(self.score(view), view.masked) < jnp.maximum(quota, 1))


@dataclasses.dataclass(frozen=True)
class Threshold:
    """Every place whose confidence exceeds tau, and at least the most confident one, in as many steps as that takes
    (Fast-dLLM, arXiv 2505.22618)."""

    tau: float

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise UserError(f"the threshold must lie in [0, 1], not {self.tau}")

    def __call__(self, view: View) -> jax.Array:
        return view.masked & ((view.confidence > self.tau) | surest(view))


@dataclasses.dataclass(frozen=True)
class Factor:
    """The n most confident places with the largest n for which (n + 1) (1 - c_n) < factor, c_n the n-th confidence, and
    at least one. With factor 1 the places chosen are those of sequential greedy decoding (Fast-dLLM, theorem 1)."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise UserError(f"the factor must be positive, not {self.factor}")

    def __call__(self, view: View) -> jax.Array:
        place = rank(view.confidence, view.masked)
        holds = view.masked & ((place + 2) * (1 - view.confidence) < self.factor)
        count = jnp.max(jnp.where(holds, place + 1, 1), -1, keepdims=True)
        return view.masked & (place < count)


@dataclasses.dataclass(frozen=True)
class EntropyBound:
    """The places of least entropy, as many as keep the sum of their entropies without the largest within `nats`; so
    that is the most by which drawing them apart can miss their joint distribution (EB-Sampler, arXiv 2505.24857)."""

    nats: float

    def __post_init__(self) -> None:
        if not self.nats >= 0:
            raise UserError(f"the bound on the entropy must not be negative, not {self.nats}")

    def __call__(self, view: View) -> jax.Array:
        score = entropy(view)
        place = rank(score, view.masked)
        ordered = jnp.sort(jnp.where(view.masked, -score, jnp.inf), -1)
        before = jnp.cumsum(ordered, -1) - ordered
        fits = jnp.take_along_axis(before, place, -1) <= self.nats
        return view.masked & (fits | (place == 0))


@dataclasses.dataclass(frozen=True)
class DiffuLLaMAConfidence:
    """The authors' second sampler (`generate_samples`): at t = T-1 .. 1 the floor(N t / T) places of the canvas that
    score lowest stay masked and the others commit, N the size of the canvas; at the end the rest.

    Places that have committed are scored again and can be among the lowest, so it is ahead of its schedule. The score
    is the log probability of the proposal under softmax(logits / temperature).
    """

    temperature: float = 0.95

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise UserError(f"the temperature of the scores must be positive, not {self.temperature}")

    def __call__(self, view: View) -> jax.Array:
        log_p = jax.nn.log_softmax(view.logits / self.temperature, -1)
        score = jnp.take_along_axis(log_p, view.tokens[..., None], -1)[..., 0]
        score = jnp.where(view.canvas, score, 1000.0)
        stay = jnp.sum(view.canvas, -1, keepdims=True) * (view.steps_left - 1) // view.steps
        cutoff = jnp.take_along_axis(jnp.sort(score, -1), jnp.minimum(stay, score.shape[1] - 1), -1)
        return view.masked & ((score >= cutoff) | (view.steps_left == 1))


def surest(view: View) -> jax.Array:
    """The most confident masked place of each sequence: bool [b, n]; the first of equals."""
    best = jnp.argmax(jnp.where(view.masked, jnp.nan_to_num(view.confidence), -1.0), -1)
    return view.masked & (jnp.arange(view.masked.shape[1]) == best[:, None])


def rank(score: jax.Array, masked: jax.Array) -> jax.Array:
    """0 for the masked place of a sequence that scores highest, 1 for the next, ...; ties by place: int [b, n].

    Masked places come before all others even where a broken model's score is not a number.
    """
    order = jnp.argsort(jnp.where(masked, -jnp.nan_to_num(score), jnp.inf), -1)  # stable
    places = jnp.arange(order.shape[-1])
    return jax.vmap(lambda row: jnp.zeros_like(row).at[row].set(places, unique_indices=True))(order)
