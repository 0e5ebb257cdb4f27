"""The forward pass of self-speculation: verifies one draft and writes the next.

The verifier agrees with none of a draft, or with its first token, ..., or with all of it, and then adds a token of its
own. The next draft depends on where that is and on which token, and it is written in the same pass, once for each of
the likeliest outcomes (as TiDAR, arXiv 2511.08923, and the quadratic form of Nemotron-Labs-Diffusion, arXiv 2607.05722,
which do not guess the token). The input is

    [clean block | noisy block of outcome 1 | ... | noisy block of outcome m],

and a token sees what it saw in training: a clean token the clean text up to itself, a noisy one its own block and the
clean text before that. The keys and values of the noisy blocks go to scratch positions behind the text.

Letters: b sequences, n positions of the canvas, w positions of a block, m outcomes, k guesses of a token, d width.
"""

import jax
import jax.numpy as jnp
from jax import Array

from dlm_jax import struct
from dlm_jax.attention.plan import Plan, plan_intervals
from dlm_jax.models.transformer import Cache, forward_planned, write_layer
from dlm_jax.sampling.cached_forward import CanvasModel
from dlm_jax.typing import Array as AnyArray
from dlm_jax.typing import Bool, Float, Float32, Int, shape_checked


@struct.dataclass
class Draft:
    """What the noisy half would write at positions that are still masked; its first guesses are in the trace."""

    end: Int[Array, " b"]  # one past its last position; where nothing is drafted, the first masked position
    guesses: Int[Array, "b n k"]  # the likeliest tokens of each position, from whichever pass last said
    probability: Float32[Array, "b n k"]  # of each under the noisy half; 0 where no pass has said


@struct.dataclass
class Outcomes:
    """Where the verifier may change or add a token, and which; the mask token stands for any other."""

    position: Int[Array, "b m"]
    token: Int[Array, "b m"]


@shape_checked
def likeliest_outcomes(first: Int[Array, " b"], draft: Draft, size: int, count: int, mask_id: int) -> Outcomes:
    """The `count` likeliest outcomes of the verification of a draft.

    A drafted token is accepted with its probability. The verifier's own token stands at position p, one past the draft
    included, if all before p are accepted and that of p is not. first: the first masked position of each sequence.
    """
    positions = first[:, None] + jnp.arange(size)  # [b, w]
    index = jnp.minimum(positions, draft.probability.shape[1] - 1)[..., None]
    probability = jnp.take_along_axis(draft.probability, index, 1)
    guesses = jnp.take_along_axis(draft.guesses, index, 1)
    drafted = (positions < draft.end[:, None])[..., None]
    accepted = jnp.where(drafted, probability[..., :1], 0.0)
    before = jnp.pad(jnp.cumprod(accepted, 1)[:, :-1], ((0, 0), (1, 0), (0, 0)), constant_values=1.0)
    other = jnp.clip(1 - jnp.sum(probability, -1, keepdims=True), 0.0)
    # At a drafted position the first guess is the draft itself, which would have been accepted.
    changed = jnp.concatenate([probability[..., :1] - accepted, probability[..., 1:], other], -1)
    tokens = jnp.concatenate([guesses, jnp.full_like(guesses[..., :1], mask_id)], -1)
    chance = jnp.where((positions <= draft.end[:, None])[..., None], before * changed, -1.0)
    b, choices = len(first), chance.shape[-1]
    best = jax.lax.top_k(chance.reshape(b, -1), count)[1]
    return Outcomes(jnp.minimum(first[:, None] + best // choices, draft.end[:, None]),
                    jnp.take_along_axis(tokens.reshape(b, -1), best, 1))


@shape_checked
def verify_and_draft(model: CanvasModel, tokens: Int[Array, "b n"], start: Int[Array, ""] | Int[Array, " b"] | int,
                     width: int, outcomes: Outcomes, cache: Cache
                     ) -> tuple[Float[Array, "b width d"], Float[Array, "b m w d"], Cache]:
    """Hidden states of the `width` clean tokens from `start` on, and of the noisy block that follows each outcome; and
    the cache.

    tokens: with the draft. start: one number, or one per sequence. The noisy block of an outcome is the one that holds
    its position: the draft before it, the outcome's token, and masks.
    """
    (b, m), (_, n), w = outcomes.position.shape, tokens.shape, model.block_size
    begin = outcomes.position // w * w  # of the noisy blocks
    clean_positions = jnp.broadcast_to(jnp.atleast_1d(start)[:, None] + jnp.arange(width), (b, width))
    noisy_positions = begin[..., None] + jnp.arange(w)  # [b, m, w]
    positions = jnp.concatenate([clean_positions, noisy_positions.reshape(b, m * w)], 1)
    read = jnp.take_along_axis(tokens, positions, -1, mode="clip")
    behind = noisy_positions - outcomes.position[..., None]
    noisy = jnp.where(behind > 0, model.spec.mask_token_id or 0,
                      jnp.where(behind == 0, outcomes.token[..., None], read[:, width:].reshape(b, m, w)))
    inputs = jnp.concatenate([read[:, :width], noisy.reshape(b, m * w)], 1)

    def write(cached: AnyArray, index: AnyArray, new: AnyArray) -> Array:
        cached = write_layer(cached, index, new[:, :width], start)
        return write_layer(cached, index, new[:, width:], n) if m else cached

    plan = plan_of_outcomes(model, clean_positions, begin, n, cache.k.shape[2])
    hidden, cache = forward_planned(model.params, inputs, positions, cache, plan, model.config, write)
    return hidden[:, :width], hidden[:, width:].reshape(b, m, w, hidden.shape[-1]), cache


def plan_of_outcomes(model: CanvasModel, clean: Int[Array, "b width"], begin: Int[Array, "b m"], n: int, keys: int
                     ) -> Plan:
    """Which of the `keys` the tokens of [clean | noisy blocks] see: of the text (region 0), and of the scratch
    positions from n on (region 1). clean: the positions of the clean tokens."""
    m, w, width = begin.shape[1], model.block_size, clean.shape[1]
    length = jnp.sum(model.segments > 0, -1)[:, None]  # positions of the text
    text_end = jnp.concatenate([jnp.minimum(clean + 1, length), jnp.repeat(begin, w, 1)], 1)
    scratch = jnp.pad(jnp.repeat(n + w * jnp.arange(m), w), (width, 0))  # where the noisy block of each token starts
    in_text = jnp.pad(jnp.repeat(jnp.clip(length - begin, 0, w), w, 1), ((0, 0), (width, 0)))
    lo = jnp.stack([jnp.zeros_like(text_end), jnp.broadcast_to(scratch, text_end.shape)], 1)
    hi = jnp.stack([text_end, scratch + in_text], 1)
    return plan_intervals(lo, hi, keys)


@shape_checked
def take_outcome(hidden: Float[Array, "b m w d"], outcomes: Outcomes, position: Int[Array, " b"],
                 token: Int[Array, " b"], mask_id: int) -> tuple[Float[Array, "b w d"], Bool[Array, " b"]]:
    """The hidden states of the noisy block of the outcome that came true, with its token if that was guessed; and
    whether it is among the outcomes at all."""
    here = outcomes.position == position[:, None]
    match = here * (2 * (outcomes.token == token[:, None]) + (outcomes.token == mask_id))
    best = jnp.argmax(match, -1)
    return jnp.take_along_axis(hidden, best[:, None, None, None], 1)[:, 0], jnp.max(match, -1) > 0


def with_scratch(cache: Cache, positions: int) -> Cache:
    """The cache with room for `positions` more behind the text."""
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, positions), (0, 0))), cache)
