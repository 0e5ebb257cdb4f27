"""Corruption: which tokens of a text are masked. Pure functions of an explicit key.

The corruption mask is kept beside the tokens and never read back from them, so a genuine occurrence of the mask id in
the data is an ordinary token.

Where a block matters, `within` is int [b, n]: the index of each token in its block, so that 0 starts a block. Levels
t [b, n] are the same throughout a block.
"""

import math

import jax
import jax.numpy as jnp

# A token that is given, such as those of a prompt, carries this beside the number of its document.
GIVEN = 2**30


def uniform(key: jax.Array, t: jax.Array) -> jax.Array:
    """Each token is masked by itself with probability t: bool, the shape of t [..., n]."""
    return jax.random.uniform(key, t.shape) < t


def uniform_at_least_one(key: jax.Array, t: jax.Array, within: jax.Array, maskable: jax.Array) -> jax.Array:
    """As `uniform`, of the maskable tokens (bool [b, n]), and of each block at least the one nearest to it."""
    u = jax.random.uniform(key, t.shape)
    return maskable & ((u < t) | largest(jnp.where(maskable, -u, -jnp.inf), jnp.ones_like(within), within))


def exact_count(key: jax.Array, t: jax.Array, within: jax.Array, maskable: jax.Array | None = None, least: int = 0,
                slope: jax.Array | float = 0.0) -> jax.Array:
    """Of the m maskable tokens of each block (all, where `maskable` bool [b, n] is None) exactly round(t m), and at
    least `least`, drawn without replacement: bool [b, n].

    The weights of the draw are w_i = exp(slope (1 - t) i): the k largest of log w_i + Gumbel noise, so that no weight
    leaves fp32 and the level is kept by the count.
    """
    maskable = jnp.ones(t.shape, bool) if maskable is None else maskable
    scores = slope * (1 - t) * within + jax.random.gumbel(key, t.shape)
    k = jnp.maximum(jnp.round(t * block_totals(maskable, within)), least)
    return maskable & largest(jnp.where(maskable, scores, -jnp.inf), k, within)


def position_dependent(key: jax.Array, t: jax.Array, within: jax.Array, block: int, half_life: jax.Array | float,
                       maskable: jax.Array | None = None, least: int = 0) -> jax.Array:
    """Later tokens of a block are masked more often (Efficient-DLM, section 3.3): bool [b, n].

    w_i = exp(beta (1 - t) i), beta = ln 2 / (half_life * block). `half_life` is the paper's lambda, the share of a
    block over which w doubles as t goes to 0; where it is infinite this is `exact_count`.
    """
    return exact_count(key, t, within, maskable, least, math.log(2) / (half_life * block))


def largest(scores: jax.Array, k: jax.Array, within: jax.Array) -> jax.Array:
    """The k [b, n] largest scores [b, n] of each block: bool [b, n]."""
    index = jnp.broadcast_to(jnp.arange(scores.shape[-1]), scores.shape)
    start = index - within
    order = jnp.lexsort((-scores, start), axis=-1)  # blocks in place, inside each the largest score first
    rank = jnp.argsort(order, axis=-1) - start
    return rank < k


def block_totals(x: jax.Array, within: jax.Array) -> jax.Array:
    """Sum of x [b, n] over the block each token is in: [b, n]. Exact for whole numbers."""
    sums = jnp.pad(jnp.cumsum(x.astype(jnp.int32), axis=-1), ((0, 0), (1, 0)))
    start = jnp.broadcast_to(jnp.arange(x.shape[-1]), x.shape) - within
    end = start + block_lengths(within)
    return jnp.take_along_axis(sums, end, axis=-1) - jnp.take_along_axis(sums, start, axis=-1)


def block_lengths(within: jax.Array) -> jax.Array:
    """Length of the block each token is in (the last of a text may be short): int [b, n], from `within` [b, n]."""
    n = within.shape[-1]
    next_index = jnp.broadcast_to(jnp.arange(1, n + 1), within.shape)
    last = jnp.pad(within[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(last, next_index, n), axis=1, reverse=True)
    return end - (next_index - 1 - within)


def predictable(segments: jax.Array) -> jax.Array:
    """Tokens that something can predict: bool [b, n].

    segments: int [b, n], the document of each token, 0 for padding. The first token of a document is protected: it is
    the given start, which nothing before it can predict.
    """
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    return same & (segments > 0)


def part_given(segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The documents int [b, n], and which tokens are given rather than learnt, bool [b, n]: see `GIVEN`."""
    return segments % GIVEN, segments >= GIVEN
