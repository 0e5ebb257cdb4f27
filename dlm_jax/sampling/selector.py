"""Selectors: which masked positions commit their proposal at a step.

Each is called as selector(view) -> bool [b, n], a subset of `view.masked`. The sampler runs until nothing is masked, so
every sequence must commit something, at the latest when one step is left. Its numbers are traced, so other values of
them compile nothing anew: one for all sequences, or [b, 1], one for each.

`SELECTORS` in `unmasking.py` names them for users.

Letters: b sequences, n positions of the window, v vocabulary.
"""

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from dlm_jax import struct
from dlm_jax.diffusion.schedule import linear
from dlm_jax.typing import Array, Float32, Int, Key, Mask, PerSequence, Tokens, shape_checked


@struct.dataclass
class View:
    """What a step knows about the window when it selects."""

    keys: Key[Array, " b"]  # for what a selector draws
    logits: Float32[Array, "b n v"]
    tokens: Tokens  # int [b, n], the proposals, at all positions
    confidence: Float32[Array, "b n"]  # the model's probability of each proposal
    masked: Mask  # bool [b, n], the positions still to be filled
    fillable: Mask  # bool [b, n], the positions that were masked at the start: all but prompt and padding
    steps: Int[jax.Array, "b 1"]  # denoising steps of the window, T
    steps_left: Int[jax.Array, "b 1"]  # those left, this one included; stays at 1 once they are used up


# Fraction of the steps taken -> fraction still masked, 1 - alpha; both in [0, 1].
Schedule = Callable[[jax.Array], jax.Array]
Score = Callable[[View], Array]  # fp32 [b, n]: positions with higher scores commit first


class Selector(Protocol):
    """What every selector offers. It is a pytree."""

    def __call__(self, view: View) -> Mask:
        """The masked positions that commit their proposal."""
        ...


@shape_checked
def unmask_fraction(schedule: Schedule, view: View) -> Float32[Array, "b 1"]:
    """The fraction of the masked positions that this step reveals: (alpha_s - alpha_t) / (1 - alpha_t).

    1 / steps left on the linear schedule, and always 1 at the last step.
    """
    steps_taken = view.steps - view.steps_left
    masked_t, masked_s = schedule(steps_taken / view.steps), schedule((steps_taken + 1) / view.steps)  # 1 - alpha
    return jnp.where(view.steps_left == 1, 1.0, (masked_t - masked_s) / jnp.maximum(masked_t, 1e-9))


@shape_checked
def uniform(view: View) -> Float32[Array, "b n"]:
    """Random numbers in [0, 1), so that positions commit in a random order."""
    return jax.vmap(lambda key: jax.random.uniform(key, view.masked.shape[1:]))(view.keys)


@shape_checked
def confidence(view: View) -> Float32[Array, "b n"]:
    """The probability of the proposal (MaskGIT, arXiv 2202.04200)."""
    return view.confidence


@shape_checked
def margin(view: View) -> Float32[Array, "b n"]:
    """The probability of the most likely token minus that of the second most likely (Kim et al., arXiv 2502.06768)."""
    top, _ = jax.lax.top_k(jax.nn.softmax(view.logits, -1), 2)
    return top[..., 0] - top[..., 1]


@shape_checked
def entropy(view: View) -> Float32[Array, "b n"]:
    """Minus the entropy of each position, in nats (Dream's `entropy`)."""
    log_p = jax.nn.log_softmax(view.logits, -1)
    return jnp.sum(jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * log_p), -1)


@shape_checked
def left_to_right(view: View) -> Float32[Array, "b n"]:
    """Earlier positions first."""
    return jnp.broadcast_to(-jnp.arange(view.masked.shape[1], dtype=jnp.float32), view.masked.shape)


@struct.dataclass
class TopScore:
    """The positions with the highest scores: as many as the schedule asks for, and at least one. Takes at most
    `view.steps` steps."""

    score: Score = struct.field(pytree_node=False, default=confidence)
    schedule: Schedule = struct.field(pytree_node=False, default=linear)

    @shape_checked
    def __call__(self, view: View) -> Mask:
        count = jnp.sum(view.masked, -1, keepdims=True)
        # The margin absorbs fp32 rounding: a third of 27 must be 9, although 27 * fp32(1/3) may exceed it.
        quota = jnp.ceil(count * unmask_fraction(self.schedule, view) - 1e-4)
        return view.masked & (rank(self.score(view), view.masked) < jnp.maximum(quota, 1))


@struct.dataclass
class Threshold:
    """Every position whose confidence exceeds tau, and at least the most confident one, in as many steps as that takes
    (Fast-dLLM, arXiv 2505.22618)."""

    tau: PerSequence  # in [0, 1]

    @shape_checked
    def __call__(self, view: View) -> Mask:
        return view.masked & ((view.confidence > self.tau) | most_confident(view))


@struct.dataclass
class Factor:
    """The n most confident positions for the largest n with (n + 1) (1 - c_n) < factor, where c_n is the n-th highest
    confidence, and at least one. With factor 1, parallel greedy decoding of them equals sequential greedy decoding
    (Fast-dLLM, theorem 1)."""

    factor: PerSequence  # positive

    @shape_checked
    def __call__(self, view: View) -> Mask:
        ranks = rank(view.confidence, view.masked)  # n - 1
        holds = view.masked & ((ranks + 2) * (1 - view.confidence) < self.factor)
        count = jnp.max(jnp.where(holds, ranks + 1, 1), -1, keepdims=True)
        return view.masked & (ranks < count)


@struct.dataclass
class Frechet:
    """The n most confident positions for the largest n with L_n - U_n > margin, and at least one (Fast-dLLM++, arXiv
    2606.02955).

    By the Frechet bounds the n most likely tokens are all right with a probability of at least L_n = sum c_i - (n - 1),
    and any other choice of tokens has one of at most U_n = 1 - c_n, whatever the joint distribution is; c_n is the n-th
    highest confidence. Where all confidences are equal and the margin is 0, this is `Factor` with factor 1; where they
    are not, it commits more.
    """

    margin: PerSequence = 0.0  # not negative

    @shape_checked
    def __call__(self, view: View) -> Mask:
        c = -jnp.sort(jnp.where(view.masked, -view.confidence, 0.0), -1)  # [b, n], descending; 0 once there are no more
        n = jnp.arange(1, c.shape[1] + 1)
        lower, upper = jnp.cumsum(c, -1) - (n - 1), 1 - c
        count = jnp.sum(lower - upper > self.margin, -1, keepdims=True)  # the difference falls with n
        return view.masked & (rank(view.confidence, view.masked) < jnp.maximum(count, 1))


@struct.dataclass
class EntropyBound:
    """The positions of lowest entropy, as many as keep the sum of their entropies, without the largest, within `nats`.

    That sum bounds the KL divergence between drawing them independently and drawing them jointly (EB-Sampler,
    arXiv 2505.24857).
    """

    nats: PerSequence  # not negative

    @shape_checked
    def __call__(self, view: View) -> Mask:
        score = entropy(view)
        ranks = rank(score, view.masked)
        ascending = jnp.sort(jnp.where(view.masked, -score, jnp.inf), -1)
        sum_of_lower = jnp.cumsum(ascending, -1) - ascending  # of the entropies below each
        fits = jnp.take_along_axis(sum_of_lower, ranks, -1) <= self.nats
        return view.masked & (fits | (ranks == 0))


@struct.dataclass
class DiffuLLaMARandom:
    """Ancestral sampling of the masked diffusion (DiffuLLaMA, algorithm 2): at t = T-1 .. 1 each position commits
    independently with probability 1 / (t + 1), and at the end the rest. A step may commit nothing, so it takes up to
    T steps for any number of positions."""

    @shape_checked
    def __call__(self, view: View) -> Mask:
        return view.masked & (uniform(view) < unmask_fraction(linear, view))


@struct.dataclass
class DiffuLLaMAConfidence:
    """The second sampler of the authors' code (`generate_samples`): at t = T-1 .. 1, of the N fillable positions the
    floor(N t / T) with the lowest scores stay masked and the others commit; at the end the rest.

    Committed positions are scored again and can be among the lowest, so it runs ahead of its schedule. The score is
    the log probability of the proposal under softmax(logits / temperature).
    """

    temperature: PerSequence = 0.95  # of the scores, positive

    @shape_checked
    def __call__(self, view: View) -> Mask:
        log_p = jax.nn.log_softmax(view.logits / jnp.asarray(self.temperature)[..., None], -1)
        score = jnp.take_along_axis(log_p, view.tokens[..., None], -1)[..., 0]
        score = jnp.where(view.fillable, score, 1000.0)
        stay_masked = jnp.sum(view.fillable, -1, keepdims=True) * (view.steps_left - 1) // view.steps
        cutoff = jnp.take_along_axis(jnp.sort(score, -1), jnp.minimum(stay_masked, score.shape[1] - 1), -1)
        return view.masked & ((score >= cutoff) | (view.steps_left == 1))


@shape_checked
def most_confident(view: View) -> Mask:
    """The most confident masked position of each sequence; the first one of equals."""
    best = jnp.argmax(jnp.where(view.masked, jnp.nan_to_num(view.confidence), -1.0), -1)
    return view.masked & (jnp.arange(view.masked.shape[1]) == best[:, None])


@shape_checked
def rank(score: Float32[Array, "b n"], masked: Mask) -> Int[Array, "b n"]:
    """0 for the masked position of a sequence with the highest score, 1 for the next, ...; ties go to the earlier one.

    Masked positions rank before all others, even if a broken model's score is NaN.
    """
    best_first = jnp.argsort(jnp.where(masked, -jnp.nan_to_num(score), jnp.inf), -1)  # stable
    ranks = jnp.arange(best_first.shape[-1])
    return jax.vmap(lambda row: jnp.zeros_like(row).at[row].set(ranks, unique_indices=True))(best_first)
