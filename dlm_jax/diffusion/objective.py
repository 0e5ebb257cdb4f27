"""From outputs and a corruption to the terms of a loss. Everything returns sums; the caller divides once, globally.

Letters: b batch, n tokens, d width, v vocabulary, B block.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

Unembed = Callable[[jax.Array], jax.Array]

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


def cross_entropy_sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array, unembed: Unembed,
                       vocab: int) -> jax.Array:
    """Sum over tokens of weights times cross-entropy, for each of c weightings: fp32 [c].

    hidden: [b, n, d]; targets: int [b, n]; weights: [c, b, n]. A token of weight 0 adds nothing.
    """
    def sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        losses = cross_entropy(unembed(hidden), targets)
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0), axis=(1, 2))

    return in_chunks(sums, vocab, (hidden, 1), (targets, 1), (weights, 2))


def divergence_sum(hidden: jax.Array, teacher: jax.Array, weights: jax.Array, unembed: Unembed,
                   unembed_teacher: Unembed, vocab: int) -> jax.Array:
    """Sum over tokens of weights [b, n] times KL(teacher || student), from hidden states [b, n, d] of both: fp32."""
    def sums(hidden: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
        log_p, log_q = (jax.nn.log_softmax(logits) for logits in (unembed_teacher(teacher), unembed(hidden)))
        losses = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.sum(jnp.where(weights > 0, weights * losses, 0.0))

    return in_chunks(sums, 2 * vocab, (hidden, 1), (teacher, 1), (weights, 1))


def in_chunks(sums: Callable[..., jax.Array], vocab: int, *pieces: tuple[jax.Array, int]) -> jax.Array:
    """`sums` of the pieces (arrays, each with the number of its token axis), added up chunk by chunk along the tokens.

    The logits, `vocab` numbers a token, are made again in the backward pass, so that those of the whole [b, n] never
    stand in memory.
    """
    arrays = [array for array, _ in pieces]
    b, n = arrays[0].shape[:2]
    chunk = min(n, max(1, LOGITS_BUDGET // (b * vocab)))
    if chunk == n:
        return sums(*arrays)

    def chunks(x: jax.Array, axis: int) -> jax.Array:
        padding = [(0, -n % chunk if a == axis else 0) for a in range(x.ndim)]
        x = jnp.pad(x, padding)
        x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1:])
        return jnp.moveaxis(x, axis, 0)

    parts = [chunks(*piece) for piece in pieces]
    total = jax.eval_shape(sums, *(part[0] for part in parts))
    totals, _ = jax.lax.scan(lambda total, piece: (total + jax.checkpoint(sums)(*piece), None),
                             jnp.zeros(total.shape), parts)
    return totals
