"""The forward pass of self-speculation: verifies one draft and writes the next.

A draft has several outcomes: the verifier agrees with none of it, or with its first token, ..., or with all of it. The
next draft depends on that, and it is written in the same pass, once for each of the likeliest outcomes (TiDAR, arXiv
2511.08923; the quadratic form of Nemotron-Labs-Diffusion, arXiv 2607.05722). The input is

    [clean block | noisy block of outcome 1 | ... | noisy block of outcome m],

and a token sees what it saw in training: a clean token the clean text up to itself, a noisy one its own block and the
clean text before that. The keys and values of the noisy blocks go to scratch positions behind the text.

Letters: b sequences, n positions of the canvas, w positions of a block, m outcomes, d width.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from dlm_jax.attention.plan import Plan, plan_intervals
from dlm_jax.models.transformer import Cache, forward_planned, write_layer
from dlm_jax.sampling.cached_forward import CanvasModel
from dlm_jax.typing import Array as AnyArray
from dlm_jax.typing import Bool, Float, Float32, Int, shape_checked


@struct.dataclass
class Draft:
    """What the noisy half would write at positions that are still masked; its tokens are in the trace."""

    end: Int[Array, " b"]  # one past its last position; where nothing is drafted, the first masked position
    confidence: Float32[Array, "b n"]  # the noisy half's probability of each token


@shape_checked
def likeliest_outcomes(first: Int[Array, " b"], draft: Draft, size: int, count: int) -> Int[Array, "b {count}"]:
    """The likeliest positions of the first token that the verifier changes or adds, one past the draft included.

    It is at position p with the probability that all tokens before p are accepted and that of p is not, and a token is
    accepted with its confidence. first: the first masked position of each sequence.
    """
    positions = first[:, None] + jnp.arange(size)
    drafted = positions < draft.end[:, None]
    accepted = jnp.where(drafted, jnp.take_along_axis(draft.confidence, positions, -1, mode="clip"), 0.0)
    before = jnp.pad(jnp.cumprod(accepted, -1)[:, :-1], ((0, 0), (1, 0)), constant_values=1.0)
    probability = jnp.where(positions <= draft.end[:, None], before * (1 - accepted), -1.0)
    best = jax.lax.top_k(probability, count)[1]
    return jnp.minimum(first[:, None] + best, draft.end[:, None])


@shape_checked
def verify_and_draft(model: CanvasModel, tokens: Int[Array, "b n"], start: Int[Array, " b"],
                     outcomes: Int[Array, "b m"], cache: Cache
                     ) -> tuple[Float[Array, "b w d"], Float[Array, "b m w d"], Cache]:
    """Hidden states of the clean block at `start`, and of the noisy block that follows each outcome; and the cache.

    tokens: with the draft. The noisy block of outcome p is the one that holds position p, masked from there on.
    """
    (b, m), (_, n), w = outcomes.shape, tokens.shape, model.block_size
    offsets = jnp.arange(w)
    begin = outcomes // w * w  # of the noisy blocks
    positions = jnp.concatenate([start[:, None], begin], 1)[..., None] + offsets  # [b, 1 + m, w]
    blocks = jnp.take_along_axis(tokens, positions.reshape(b, -1), -1, mode="clip").reshape(positions.shape)
    noisy = jnp.where(positions[:, 1:] >= outcomes[..., None], model.spec.mask_token_id or 0, blocks[:, 1:])
    inputs = jnp.concatenate([blocks[:, :1], noisy], 1).reshape(b, -1)

    def write(cached: AnyArray, index: AnyArray, new: AnyArray) -> Array:
        cached = write_layer(cached, index, new[:, :w], start)
        return write_layer(cached, index, new[:, w:], n) if m else cached

    plan = plan_of_outcomes(model, start, begin, n)
    hidden, cache = forward_planned(model.params, inputs, positions.reshape(b, -1), cache, plan, model.config, write)
    return hidden[:, :w], hidden[:, w:].reshape(b, m, w, hidden.shape[-1]), cache


def plan_of_outcomes(model: CanvasModel, start: Int[Array, " b"], begin: Int[Array, "b m"], n: int) -> Plan:
    """Which keys the tokens of [clean block | noisy blocks] see: of the text (region 0), and of the scratch positions
    from n on (region 1)."""
    (_, m), w = begin.shape, model.block_size
    length = jnp.sum(model.segments > 0, -1)[:, None]  # positions of the text
    clean = jnp.minimum(start[:, None] + 1 + jnp.arange(w), length)
    text_end = jnp.concatenate([clean, jnp.repeat(begin, w, 1)], 1)
    scratch = jnp.pad(jnp.repeat(n + w * jnp.arange(m), w), (w, 0))  # where the noisy block of each token starts
    in_text = jnp.pad(jnp.repeat(jnp.clip(length - begin, 0, w), w, 1), ((0, 0), (w, 0)))
    lo = jnp.stack([jnp.zeros_like(text_end), jnp.broadcast_to(scratch, text_end.shape)], 1)
    hi = jnp.stack([text_end, scratch + in_text], 1)
    return plan_intervals(lo, hi, n + m * w)


@shape_checked
def take_outcome(hidden: Float[Array, "b m w d"], outcomes: Int[Array, "b m"], actual: Int[Array, " b"]
                 ) -> tuple[Float[Array, "b w d"], Bool[Array, " b"]]:
    """The hidden states of the noisy block of the outcome that came true, and whether it is among the outcomes."""
    matches = outcomes == actual[:, None]
    index = jnp.argmax(matches, -1)
    return jnp.take_along_axis(hidden, index[:, None, None, None], 1)[:, 0], jnp.any(matches, -1)


def with_scratch(cache: Cache, positions: int) -> Cache:
    """The cache with room for `positions` more behind the text."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, positions), (0, 0), (0, 0))), cache)
