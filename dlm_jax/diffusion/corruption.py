"""Corruption: which tokens of a text are masked. Pure functions of an explicit key.

The corruption mask is kept beside the tokens and never read back from them, so a genuine occurrence of the mask id in
the data is an ordinary token.

`offset_in_block` is the index of each token in its block; 0 starts a block. Levels t are constant throughout a block.
Letters: b batch, n tokens.
"""

import math

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Bool, Float, Int, Key, Shaped, shape_checked


@shape_checked
def uniform(key: Key[Array, ""], t: Float[Array, "*n"]) -> Bool[jax.Array, "*n"]:
    """Each token is masked independently with probability t."""
    return jax.random.uniform(key, t.shape) < t


@shape_checked
def uniform_min_one(key: Key[Array, ""], t: Float[Array, "b n"], offset_in_block: Int[Array, "b n"],
                    maskable: Bool[Array, "b n"]) -> Bool[Array, "b n"]:
    """As `uniform`, among the maskable tokens; in each block at least the one that comes nearest to being masked is."""
    u = jax.random.uniform(key, t.shape)
    drawn = u < t
    nearest = top_k_per_block(jnp.where(maskable, -u, -jnp.inf), jnp.ones_like(offset_in_block), offset_in_block)
    return maskable & (drawn | nearest)


@shape_checked
def exact_count(key: Key[Array, ""], t: Float[Array, "b n"], offset_in_block: Int[Array, "b n"],
                maskable: Bool[Array, "b n"] | None = None, min_count: int = 0,
                slope: Float[Array, ""] | float = 0.0) -> Bool[Array, "b n"]:
    """Masks exactly round(t m) of the m maskable tokens of each block (all tokens, where `maskable` is None), and at
    least `min_count`, drawn without replacement.

    Token i of a block has the weight w_i = exp(slope (1 - t) i). The draw takes the k largest of log w_i + Gumbel noise
    (Gumbel-top-k), so that no weight leaves fp32; the count alone sets the level.
    """
    maskable = jnp.ones(t.shape, bool) if maskable is None else maskable
    scores = slope * (1 - t) * offset_in_block + jax.random.gumbel(key, t.shape)
    k = jnp.maximum(jnp.round(t * block_totals(maskable, offset_in_block)), min_count)
    return maskable & top_k_per_block(jnp.where(maskable, scores, -jnp.inf), k, offset_in_block)


@shape_checked
def position_dependent(key: Key[Array, ""], t: Float[Array, "b n"], offset_in_block: Int[Array, "b n"],
                       block_size: int, half_life: Float[Array, ""] | float,
                       maskable: Bool[Array, "b n"] | None = None, min_count: int = 0) -> Bool[Array, "b n"]:
    """As `exact_count`, but later tokens of a block are masked more often (Efficient-DLM, section 3.3).

    w_i = exp(beta (1 - t) i), beta = ln 2 / (half_life * block_size). `half_life` is the paper's lambda, the fraction
    of a block over which w doubles as t goes to 0; an infinite one makes this `exact_count`.
    """
    return exact_count(key, t, offset_in_block, maskable, min_count, math.log(2) / (half_life * block_size))


@shape_checked
def block_ends(t: Float[Array, "b n"], offset_in_block: Int[Array, "b n"], maskable: Bool[Array, "b n"]
               ) -> Bool[Array, "b n"]:
    """Masks exactly the last round(t m) of the m maskable tokens of each block."""
    scores = jnp.where(maskable, offset_in_block.astype(t.dtype), -jnp.inf)
    k = jnp.round(t * block_totals(maskable, offset_in_block))
    return maskable & top_k_per_block(scores, k, offset_in_block)


@shape_checked
def top_k_per_block(scores: Float[Array, "b n"], k: Shaped[Array, "b n"], offset_in_block: Int[Array, "b n"]
                    ) -> Bool[jax.Array, "b n"]:
    """The k largest scores of each block."""
    index = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
    start = index - offset_in_block
    order = jnp.lexsort((-scores, start), axis=-1)  # keeps the order of the blocks, and sorts each by falling score
    rank = jnp.argsort(order, axis=-1) - start
    return rank < k


@shape_checked
def block_totals(x: Shaped[Array, "b n"], offset_in_block: Int[Array, "b n"]) -> Int[jax.Array, "b n"]:
    """For each token, the sum of x (bool or int) over its block."""
    sums = jnp.pad(jnp.cumsum(x.astype(jnp.int32), axis=-1), ((0, 0), (1, 0)))
    start = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape) - offset_in_block
    end = start + block_lengths(offset_in_block)
    return jnp.take_along_axis(sums, end, axis=-1) - jnp.take_along_axis(sums, start, axis=-1)


@shape_checked
def block_lengths(offset_in_block: Int[Array, "b n"]) -> Int[jax.Array, "b n"]:
    """For each token, the length of its block; the last block of a text may be short."""
    n = offset_in_block.shape[-1]
    next_index = jnp.broadcast_to(jnp.arange(1, n + 1), offset_in_block.shape)
    last = jnp.pad(offset_in_block[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(last, next_index, n), axis=1, reverse=True)
    return end - (next_index - 1 - offset_in_block)
