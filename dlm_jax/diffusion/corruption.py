"""Corruption: which tokens of a text are masked. Pure functions of an explicit key.

The corruption mask is kept beside the tokens and never read back from them, so a genuine occurrence of the mask id in
the data is an ordinary token.
"""

import math

import jax
import jax.numpy as jnp


def uniform(key: jax.Array, t: jax.Array) -> jax.Array:
    """Each token is masked by itself with probability t: bool, the shape of t [..., n]."""
    return jax.random.uniform(key, t.shape) < t


def position_dependent(key: jax.Array, t: jax.Array, within: jax.Array, block: int, half_life: float) -> jax.Array:
    """Later tokens of a block are masked more often (Efficient-DLM, section 3.3): bool [b, n].

    t: [b, n], one level a block; within: int [b, n], index of each token in its block, so that 0 starts a block.
    Exactly k = round(t * length) tokens of each block are drawn without replacement with weights
    w_i = exp(beta (1 - t) i), beta = ln 2 / (half_life * block): the k largest of log w_i + Gumbel noise, so the level
    is kept by the count. `half_life` is the paper's lambda, the share of a block over which w doubles as t goes to 0.
    """
    beta = math.log(2) / (half_life * block)
    scores = beta * (1 - t) * within + jax.random.gumbel(key, t.shape)
    index = jnp.broadcast_to(jnp.arange(t.shape[-1]), t.shape)
    start = index - within
    order = jnp.lexsort((-scores, start), axis=-1)  # blocks in place, inside each the largest score first
    rank = jnp.argsort(order, axis=-1) - start
    return rank < jnp.round(t * block_lengths(within))


def block_lengths(within: jax.Array) -> jax.Array:
    """Length of the block each token is in (the last of a text may be short): int [b, n], from `within` [b, n]."""
    n = within.shape[-1]
    next_index = jnp.broadcast_to(jnp.arange(1, n + 1), within.shape)
    last = jnp.pad(within[:, 1:] == 0, ((0, 0), (0, 1)), constant_values=True)
    end = jax.lax.cummin(jnp.where(last, next_index, n), axis=1, reverse=True)
    return end - (next_index - 1 - within)


def predictable(segments: jax.Array) -> jax.Array:
    """Tokens that may be masked and that count in a loss: bool [b, n].

    segments: int [b, n], the document of each token, 0 for padding. The first token of a document is protected: it is
    the given start, which nothing before it can predict.
    """
    same = jnp.pad(segments[:, 1:] == segments[:, :-1], ((0, 0), (1, 0)))
    return same & (segments > 0)
