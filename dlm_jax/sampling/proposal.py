"""Proposals: the token that each position would take, and the model's probability of it."""

import jax
import jax.numpy as jnp
from jax import Array

from dlm_jax import struct
from dlm_jax.errors import UserError
from dlm_jax.typing import Float32, Int, Int32, Key, PerSequence, Shaped, shape_checked

# Beyond these temperatures logits / temperature leaves the range of fp32, and a banned token could be drawn.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
PerRow = Shaped[Array, "*#n 1"] | float | int


def check_proposal(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Raises `UserError` for fields of a `Proposal` outside their range."""
    if temperature != 0 and not MIN_TEMPERATURE <= temperature <= MAX_TEMPERATURE:
        raise UserError(f"temperature must be 0 or lie in [{MIN_TEMPERATURE}, {MAX_TEMPERATURE}], not {temperature}")
    if not 0 <= top_k < 2**31:
        raise UserError(f"top_k must lie in [0, {2**31 - 1}], not {top_k}")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p must lie in (0, 1], not {top_p}")
    if not 0 <= min_p <= 1:
        raise UserError(f"min_p must lie in [0, 1], not {min_p}")


@struct.dataclass
class Proposal:
    """Proposes a token for each position: the most likely one, or a draw. Called as proposal(keys, logits).

    Its numbers are traced: one for all sequences, or [b, 1], one for each.
    """

    temperature: PerSequence = 0.0  # 0: the most likely token; above: a draw from softmax(logits / temperature)
    top_k: PerSequence = 0  # draws among the `top_k` most likely tokens only; 0: among all
    top_p: PerSequence = 1.0  # among the smallest set of most likely tokens that holds this much of the probability
    min_p: PerSequence = 0.0  # among tokens at least this many times as probable as the most likely (arXiv 2407.01082)

    @shape_checked
    def __call__(self, keys: Key[Array, "b n"], logits: Float32[Array, "b n v"]
                 ) -> tuple[Int[Array, "b n"], Float32[Array, "b n"]]:
        """Tokens, and the model's probability of each, before temperature and truncation.

        keys: one per position, so that what is drawn there depends neither on the rest of the batch nor on padding.
        """
        tokens = self.tokens(keys, logits)
        return tokens, probability(logits, tokens[..., None])[..., 0]

    def tokens(self, keys: Key[Array, "b n"], logits: Float32[Array, "b n v"]) -> Int[Array, "b n"]:
        """The tokens alone."""
        likeliest, drawn = argmax(logits), jnp.asarray(self.temperature) > 0
        return jax.lax.cond(jnp.any(drawn), lambda: jnp.where(drawn, self.draw(keys, logits), likeliest),
                            lambda: likeliest)

    def draw(self, keys: Key[Array, "b n"], logits: Float32[Array, "b n v"]) -> Int[Array, "b n"]:
        """A draw for each position, as if no temperature were 0."""
        temperature, top_k, top_p, min_p = (jnp.asarray(x)[..., None] for x in (self.temperature, self.top_k,
                                                                                self.top_p, self.min_p))
        scaled = logits / jnp.where(temperature > 0, temperature, 1)
        kept = keep_min_p(keep_top_p(keep_top_k(scaled, top_k), top_p), min_p)
        noise = jax.vmap(jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:])))(keys)
        return argmax(kept + noise)  # the Gumbel-max trick draws from the softmax


@shape_checked
def probability(logits: Float32[Array, "*n v"], tokens: Int[Array, "*n k"]) -> Float32[Array, "*n k"]:
    """The model's probability of some tokens of each position."""
    return jnp.exp(jnp.take_along_axis(logits, tokens, -1) - jax.nn.logsumexp(logits, -1, keepdims=True))


@shape_checked
def argmax(logits: Float32[Array, "*n v"]) -> Int32[Array, "*n"]:
    """The index of the largest logit, the first one of equals, and 0 where all are NaN.

    Equal to `jnp.argmax`, which XLA's CPU compiler makes ten times slower than these two fp32 reductions. Exact for
    vocabularies below 2**24.
    """
    top = jnp.max(logits, -1, keepdims=True)
    index = jax.lax.broadcasted_iota(jnp.float32, logits.shape, logits.ndim - 1)
    found = jnp.min(jnp.where(logits == top, index, jnp.inf), -1)
    return jnp.where(jnp.isfinite(found), found, 0).astype(jnp.int32)


def keep_top_k(logits: Float32[Array, "*n v"], k: PerRow) -> Float32[Array, "*n v"]:
    """The k largest logits and those equal to the last of them, -inf elsewhere. k = 0 keeps all."""
    some = (jnp.asarray(k) > 0) & (jnp.asarray(k) < logits.shape[-1])
    return jax.lax.cond(jnp.any(some), lambda: jnp.where(some, keep_largest(logits, jnp.ones_like(logits), k), logits),
                        lambda: logits)


def keep_top_p(logits: Float32[Array, "*n v"], p: PerRow) -> Float32[Array, "*n v"]:
    """The fewest largest logits whose probabilities sum to p, -inf elsewhere (nucleus sampling, Holtzman et al. 2019).
    p = 1 keeps all."""
    some = jnp.asarray(p) < 1
    return jax.lax.cond(
        jnp.any(some), lambda: jnp.where(some, keep_largest(logits, jax.nn.softmax(logits, -1), p), logits),
        lambda: logits)


@shape_checked
def keep_largest(logits: Float32[Array, "*n v"], weight: Float32[Array, "*n v"], sum_to: PerRow
                 ) -> Float32[Array, "*n v"]:
    """The fewest largest logits whose weights sum to at least `sum_to`, -inf elsewhere.

    A binary search finds the smallest logit to keep. It halves the range of fp32 numbers, mapped to integers of the
    same order, so 32 reductions over the logits are exact, and on a CPU 20 times faster than XLA's sort.
    """
    value = ordered_bits(logits)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """`low` always keeps enough; everything above `high` does not."""
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + ((low | high) & 1)
        enough = jnp.sum(jnp.where(value >= middle, weight, 0), -1, keepdims=True) >= sum_to
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    ends = jnp.min(value, -1, keepdims=True), jnp.max(value, -1, keepdims=True)
    return jnp.where(value < jax.lax.fori_loop(0, 32, halve, ends)[0], -jnp.inf, logits)


@shape_checked
def ordered_bits(x: Float32[Array, "*n"]) -> Int32[Array, "*n"]:
    """Maps fp32 numbers to int32 numbers of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def keep_min_p(logits: Float32[Array, "*n v"], p: PerRow) -> Float32[Array, "*n v"]:
    """The logits whose probability is at least p times the largest, -inf elsewhere."""
    return jnp.where(logits < jnp.max(logits, -1, keepdims=True) + jnp.log(p), -jnp.inf, logits)


@shape_checked
def without(logits: Float32[Array, "*n v"], *tokens: int | None) -> Float32[Array, "*n v"]:
    """The logits with some tokens banned, such as the mask token, which is never proposed."""
    for token in tokens:
        logits = logits if token is None else jnp.where(jnp.arange(logits.shape[-1]) == token, -jnp.inf, logits)
    return logits
