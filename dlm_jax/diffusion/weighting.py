"""Loss weights of masked tokens, and what the sum of the weighted losses is divided by.

Letters: b batch, n tokens; t level of a token, m maskable and k masked tokens of its block.
"""

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.corruption import block_totals
from dlm_jax.typing import Array, Bool, Float, Int, shape_checked

CART_P = 0.3  # the sharpness of CART's geometric distribution


@shape_checked
def inverse_level(masked: Bool[Array, "b n"], t: Float[Array, "b n"]) -> Float[jax.Array, "b n"]:
    """1/t at masked tokens, 0 elsewhere: the weights of the NELBO (MDLM, arXiv 2406.07524). Needs t > 0."""
    return jnp.where(masked, 1 / t, 0.0)


@shape_checked
def inverse_count(masked: Bool[Array, "b n"], maskable: Bool[Array, "b n"], offset_in_block: Int[Array, "b n"]
                  ) -> Float[jax.Array, "b n"]:
    """m/k at the k masked tokens of a block of m maskable ones, 0 elsewhere: the realized 1/t, at most m."""
    m, k = block_totals(maskable, offset_in_block), block_totals(masked, offset_in_block)
    return jnp.where(masked, m / jnp.maximum(k, 1), 0.0)


@shape_checked
def cart(masked: Bool[Array, "b n"], visible: Bool[Array, "b n"], segments: Int[Array, "b n"], p: float = CART_P
         ) -> Float[jax.Array, "b n"]:
    """Context-adaptive rescheduling (CART, Dream, arXiv 2508.15487): the weight of masked token n is

        w_n = 1/2 sum over the visible i of its document of Geo(p, |n - i| - 1),  Geo(p, j) = p (1 - p)^j,

    between 0 and 1: the more of its near neighbors are visible, the more it counts. 0 at tokens that are not masked.
    """
    def flipped(x: Array) -> jax.Array:
        return jnp.flip(x, 1)

    left = decayed_sum(visible, segments, p)
    right = flipped(decayed_sum(flipped(visible), flipped(segments), p))
    return jnp.where(masked, (left + right) / 2, 0.0)


@shape_checked
def decayed_sum(visible: Bool[Array, "b n"], segments: Int[Array, "b n"], p: float) -> Float[jax.Array, "b n"]:
    """g_n = (1 - p) g_{n-1} + p [n-1 is visible], restarting from 0 at each document."""
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    previous = jnp.pad(visible[:, :-1], ((0, 0), (1, 0)))

    # Each token is an affine map g -> a g + b, written (a, b); a prefix of the text is the composition of its maps.
    def compose(first: tuple[jax.Array, jax.Array], second: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        return first[0] * second[0], first[1] * second[0] + second[1]

    return jax.lax.associative_scan(compose, ((1 - p) * same, p * (same & previous)), axis=1)[1]


@shape_checked
def normalize_weights(weight: Float[Array, "b n"], masked: Bool[Array, "b n"], targets: Bool[Array, "b n"],
                      normalizer: str) -> Float[Array, "b n"]:
    """`weight` rescaled so that the loss is always the sum of weighted losses divided by the targets of the batch.

    'tokens': unchanged. 'masked': as if divided by the masked tokens of the batch instead. 'masked_each': the mean over
    records of the record's sum divided by its own masked tokens; heavy-tailed, because a record may have few.
    """
    if normalizer == "tokens":
        return weight
    tokens, masks = jnp.sum(targets), jnp.sum(masked, axis=1, keepdims=True)
    if normalizer == "masked":
        return weight * tokens / jnp.maximum(jnp.sum(masks), 1)
    records = jnp.sum(jnp.any(targets, axis=1))
    return weight * tokens / jnp.maximum(masks * records, 1)
