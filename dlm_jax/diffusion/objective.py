"""From outputs and a corruption to the terms of a loss. Everything returns sums; the caller divides once, globally.

Letters: b batch, n tokens, d width, v vocabulary, B block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Logits of one chunk: at most this many numbers, 128 MiB in fp32.
LOGITS_BUDGET = 2**25


def shift(outputs: jax.Array, first: jax.Array | None = None) -> jax.Array:
    """Shifted alignment: place n gets the output at n-1; place 0 gets `first` [b, d] (zeros where nothing predicts it).

    outputs: [b, n, d].
    """
    first = jnp.zeros_like(outputs[:, 0]) if first is None else first
    return jnp.concatenate([first[:, None], outputs[:, :-1]], axis=1)


def shift_two_streams(noisy: jax.Array, clean: jax.Array, positions: jax.Array, block: int) -> jax.Array:
    """Shifted alignment in two streams: token n is predicted by the noisy output at n-1, and the first token of a block
    by the clean output at n-1, the last of the block before.

    noisy, clean: [b, n, d]; positions: [b or 1, n], inside the document.
    """
    first_of_block = (positions % block == 0)[..., None]
    return jnp.where(first_of_block, shift(clean), shift(noisy))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """-log softmax(logits)[target] in fp32: [..., v] and int [...] to [...]."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def cross_entropy_sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array,
                       unembed: Callable[[jax.Array], jax.Array], vocab: int) -> jax.Array:
    """Sum over tokens of weights times cross-entropy, for each of c weightings: fp32 [c].

    hidden: [b, n, d]; targets: int [b, n]; weights: [c, b, n]. The logits are made chunk by chunk along n, and again in
    the backward pass, so that the whole [b, n, v] never stands in memory. A token of weight 0 adds nothing.
    """
    b, n, _ = hidden.shape
    chunk = min(n, max(1, LOGITS_BUDGET // (b * vocab)))

    def sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        losses = cross_entropy(unembed(hidden), targets)
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0), axis=(1, 2))

    if chunk == n:
        return sums(hidden, targets, weights)

    def chunks(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, -n % chunk if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1:])
        return jnp.moveaxis(x, axis, 0)

    pieces = (chunks(hidden, 1), chunks(targets, 1), chunks(weights, 2))
    totals, _ = jax.lax.scan(lambda total, piece: (total + jax.checkpoint(sums)(*piece), None),
                             jnp.zeros(weights.shape[0]), pieces)
    return totals
