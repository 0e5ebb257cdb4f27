"""From hidden states and a corruption to the terms of a loss. Everything returns sums; the caller divides once,
globally.

Letters: b batch, n tokens, d width, v vocabulary, c weightings.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array, Float, Float32, Hidden, Int, Tokens, shape_checked

Unembed = Callable[[jax.Array], jax.Array]  # hidden states [..., d] to logits [..., v]

TokenLoss = Callable[[jax.Array, jax.Array], jax.Array]  # (logits [b, n, v], targets [b, n]) to losses [b, n]

# The logits of one chunk are at most this many numbers, 512 MiB in fp32. With more chunks the gradient of the head, as
# large as the head itself, is written and read more often.
LOGITS_BUDGET = 2**27


@shape_checked
def shift(hidden: Hidden, first: Float[Array, "b d"] | None = None) -> Float[jax.Array, "b n d"]:
    """Shifted alignment: position n gets the hidden state at n-1, and position 0 gets `first` (zeros by default, for a
    token that nothing predicts)."""
    first = jnp.zeros_like(hidden[:, 0]) if first is None else first
    return jnp.concatenate([first[:, None], hidden[:, :-1]], axis=1)


@shape_checked
def shift_two_streams(noisy: Hidden, clean: Hidden, positions: Int[Array, "#b n"], block_size: int
                      ) -> Float[jax.Array, "b n d"]:
    """Shifted alignment in two streams: token n is predicted by the noisy hidden state at n-1, and the first token of a
    block by the clean one at n-1, the last of the block before. `positions` count from the start of the document."""
    first_of_block = (positions % block_size == 0)[..., None]
    return jnp.where(first_of_block, shift(clean), shift(noisy))


@shape_checked
def cross_entropy(logits: Float[Array, "*n v"], targets: Int[Array, "*n"]) -> Float[jax.Array, "*n"]:
    """-log softmax(logits)[target], in the dtype of the logits."""
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


@shape_checked
def uncertainty(logits: Float[Array, "*n v"], targets: Int[Array, "*n"]) -> Float[jax.Array, "*n"]:
    """The entropy of softmax(2 logits) in nats where the most likely token is the target, 0 elsewhere: what
    certainty-forcing minimizes (dParallel, arXiv 2509.26488, with its temperature of 1/2)."""
    log_p = jax.nn.log_softmax(2 * logits, -1)
    picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return jnp.where(picked == jnp.max(logits, -1), -jnp.sum(jnp.exp(log_p) * log_p, -1), 0.0)


@shape_checked
def cross_entropy_sums(hidden: Hidden, targets: Tokens, weights: Float[Array, "c b n"], unembed: Unembed,
                       vocab_size: int, extra: TokenLoss | None = None) -> Float32[jax.Array, " sums"]:
    """The sum over tokens of weight times cross-entropy, for each of c weightings. A token of weight 0 adds nothing.

    extra: a second loss of each token; its sum under the first weighting is appended.
    """
    def sums(hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        logits = unembed(hidden)
        found = weighted_sums(cross_entropy(logits, targets), weights)
        return found if extra is None else jnp.concatenate([found, weighted_sums(extra(logits, targets), weights[:1])])

    return sum_in_chunks(sums, vocab_size, (hidden, 1), (targets, 1), (weights, 2))


@shape_checked
def weighted_sums(losses: Float[Array, "b n"], weights: Float[Array, "c b n"]) -> Float[jax.Array, " c"]:
    """The sum over tokens of weight times loss, for each weighting. A token of weight 0 adds nothing."""
    return jnp.sum(jnp.where(weights != 0, weights * losses, 0.0), axis=(1, 2))


@shape_checked
def divergence_sum(hidden: Hidden, teacher: Hidden, weights: Float[Array, "b n"], unembed: Unembed,
                   unembed_teacher: Unembed, vocab_size: int) -> Float32[jax.Array, ""]:
    """The sum over tokens of weight times KL(teacher || student), from the hidden states of both."""
    def sums(hidden: jax.Array, teacher: jax.Array, weights: jax.Array) -> jax.Array:
        log_p, log_q = (jax.nn.log_softmax(logits) for logits in (unembed_teacher(teacher), unembed(hidden)))
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.sum(jnp.where(weights > 0, weights * kl, 0.0))

    return sum_in_chunks(sums, 2 * vocab_size, (hidden, 1), (teacher, 1), (weights, 1))


def sum_in_chunks(sums: Callable[..., jax.Array], logits_per_token: int, *inputs: tuple[Array, int]) -> jax.Array:
    """`sums` of the inputs, computed in chunks of tokens and added up. Each input is (array, its token axis).

    `logits_per_token` sets the chunk size. Logits are recomputed in the backward pass, so those of the full [b, n] are
    never in memory at once.
    """
    arrays = [array for array, _ in inputs]
    b, n = arrays[0].shape[:2]
    chunk = chunk_size(n, max(1, LOGITS_BUDGET // (b * logits_per_token)))
    if chunk == n:
        return sums(*arrays)

    chunks = [split_tokens(array, axis, chunk) for array, axis in inputs]
    result = jax.eval_shape(sums, *(x[0] for x in chunks))

    def add(total: jax.Array, inputs: list[jax.Array]) -> tuple[jax.Array, None]:
        return total + jax.checkpoint(sums)(*inputs), None

    total, _ = jax.lax.scan(add, jnp.zeros(result.shape), chunks)
    return total


def chunk_size(n: int, most: int) -> int:
    """The size of a chunk of n tokens: about `most` and at least half of that, without a rest where n can be so
    divided."""
    fewest = -(-n // most)
    return -(-n // next((parts for parts in range(fewest, 2 * fewest) if n % parts == 0), fewest))


def split_tokens(x: Array, axis: int, chunk: int) -> jax.Array:
    """`x` cut along `axis` into chunks, the last one padded with zeros: [chunks, ..., chunk, ...]."""
    padding = [(0, -x.shape[axis] % chunk if a == axis else 0) for a in range(x.ndim)]
    x = jnp.pad(x, padding)
    x = x.reshape(*x.shape[:axis], -1, chunk, *x.shape[axis + 1:])
    return jnp.moveaxis(x, axis, 0)
