"""How much a masked token counts: weights, and what their sum is divided by. All arrays are [b, n]."""

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.corruption import block_totals

SHARPNESS = 0.3  # of CART's geometric distribution


def inverse_level(masked: jax.Array, t: jax.Array) -> jax.Array:
    """1/t at masked tokens, 0 elsewhere: the weights of the NELBO (MDLM, arXiv 2406.07524) where t > 0."""
    return jnp.where(masked, 1 / t, 0.0)


def inverse_count(masked: jax.Array, maskable: jax.Array, within: jax.Array) -> jax.Array:
    """m/k at the k masked tokens of a block of m maskable ones, 0 elsewhere: 1/t as it was drawn, never above m."""
    m, k = block_totals(maskable, within), block_totals(masked, within)
    return jnp.where(masked, m / jnp.maximum(k, 1), 0.0)


def cart(masked: jax.Array, visible: jax.Array, segments: jax.Array, p: float = SHARPNESS) -> jax.Array:
    """Context-adaptive rescheduling (Dream, arXiv 2508.15487): a masked token n counts
    w_n = 1/2 sum over visible i of Geo(p, |n - i| - 1), Geo(p, j) = p (1 - p)^j, within its document.

    Between 0 and 1: the more of its near neighbours it can see, the more.
    """
    def flipped(x: jax.Array) -> jax.Array:
        return jnp.flip(x, 1)

    left = decayed_sum(visible, segments, p)
    right = flipped(decayed_sum(flipped(visible), flipped(segments), p))
    return jnp.where(masked, (left + right) / 2, 0.0)


def decayed_sum(visible: jax.Array, segments: jax.Array, p: float) -> jax.Array:
    """g_n = (1 - p) g_{n-1} + p [n - 1 is visible], from 0 at the start of each document: fp32."""
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    before = jnp.pad(visible[:, :-1], ((0, 0), (1, 0)))

    def then(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(then, ((1 - p) * same, p * (same & before)), axis=1)[1]


def over_tokens(weight: jax.Array, masked: jax.Array, targets: jax.Array, normaliser: str) -> jax.Array:
    """`weight` such that the sum of weighted losses divided by the targets of the batch is the loss.

    'tokens': as it is. 'masked': divided by the masked tokens of the batch instead. 'masked_each': the mean over
    records of the sum divided by the masked tokens of the record; heavy-tailed, because a record may have few.
    """
    if normaliser == "tokens":
        return weight
    tokens, masks = jnp.sum(targets), jnp.sum(masked, axis=1, keepdims=True)
    if normaliser == "masked":
        return weight * tokens / jnp.maximum(jnp.sum(masks), 1)
    records = jnp.sum(jnp.any(targets, axis=1))
    return weight * tokens / jnp.maximum(masks * records, 1)
