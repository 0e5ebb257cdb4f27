"""The sampler's input (`Canvas`, `Sampler`) and its record of what it did (`Trace`).

Letters: b sequences, n positions of the canvas.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dlm_jax import struct
from dlm_jax.sampling.cached_forward import CachePolicy, slice_window, update_window
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.unmasking import Unmasking
from dlm_jax.typing import Bool, Float32, Int, Key, shape_checked


@struct.dataclass
class Canvas:
    """What the sampler starts from: prompts, and the masked positions to fill."""

    tokens: Int[Array, "b n"]  # ignored at masked positions
    masked: Bool[Array, "b n"]  # the positions to fill
    segments: Int[Array, "b n"]  # 1 for text and 0 for padding


@struct.dataclass
class Sampler:
    """How to sample. All its numbers are traced, so other values of them recompile nothing; the rest is static."""

    steps: Int[Array, " b"]  # denoising steps, which the blocks share by the positions they have to fill
    eos_id: Int[Array, " b"]  # the token that ends a sequence, -1 for none
    proposal: Proposal  # which token each position would take
    unmasking: Unmasking  # which positions commit their proposal
    caching: CachePolicy = struct.field(pytree_node=False)  # what is recomputed at each step
    block_size: int = struct.field(pytree_node=False)  # positions per block, 0 for the whole canvas
    # How many positions hold every prompt and the block after it; 0: nobody has counted.
    prompt_length: int = struct.field(pytree_node=False, default=0)
    cfg_scale: float = struct.field(pytree_node=False, default=0.0)  # strength of classifier-free guidance
    suppress_tokens: tuple[int, ...] = struct.field(pytree_node=False, default=())  # ids that are never proposed
    callback: "Callback | None" = struct.field(pytree_node=False, default=None)  # called after every step


@struct.dataclass
class Trace:
    """What has happened on the canvas so far, or in a window of it (see `window`). Callbacks get it as numpy arrays."""

    tokens: Int[Array, "b n"]  # a masked position holds whatever was there before
    masked: Bool[Array, "b n"]  # the positions still to be filled
    commit_step: Int[Array, "b n"]  # the denoising step, from 1, that last wrote the token; 0 for the prompt
    confidence: Float32[Array, "b n"]  # the model's probability of the token when it was written
    remasked: Bool[Array, "b n"]  # positions that were masked a second time
    nfe: Int[Array, " b"]  # forward passes each sequence took part in, prefill and caching of finished blocks included
    batch_nfe: Int[Array, " b"]  # forward passes of the batch, one number for all its sequences

    def window(self, start: Int[Array, " b"], size: int) -> "Trace":
        """The positions start .. start + size of each sequence."""
        return dataclasses.replace(self, **{name: slice_window(getattr(self, name), start, size)
                                            for name in PER_POSITION})

    def with_window(self, window: "Trace", start: Int[Array, " b"]) -> "Trace":
        """This trace with `window` written at `start` of each sequence: the inverse of `window`."""
        return dataclasses.replace(self, **{name: update_window(getattr(self, name), getattr(window, name), start)
                                            for name in PER_POSITION})


PER_POSITION = ("tokens", "masked", "commit_step", "confidence", "remasked")  # the fields of shape [b, n]
Callback = Callable[[Trace], None]


def new_trace(canvas: Canvas) -> Trace:
    """The trace before the first step."""
    b, _ = canvas.tokens.shape
    zeros = jnp.zeros(canvas.tokens.shape)
    return Trace(canvas.tokens, canvas.masked, zeros.astype(jnp.int32), zeros, zeros.astype(bool),
                 jnp.zeros(b, jnp.int32), jnp.zeros(b, jnp.int32))


@shape_checked
def unfinished(trace: Trace) -> Bool[Array, " b"]:
    """The sequences that still have a masked position."""
    return jnp.any(trace.masked, -1)


@shape_checked
def count_forward(trace: Trace, active: Bool[Array, " b"], passes: int = 1) -> Trace:
    """`trace` after more forward passes of the batch, in which the `active` sequences took part."""
    return dataclasses.replace(trace, nfe=trace.nfe + passes * active, batch_nfe=trace.batch_nfe + passes)


@shape_checked
def stop_at_end(trace: Trace, first: Int[Array, " b"], eos_id: Int[Array, " b"]) -> Trace:
    """Leaves the positions from `first` on unfilled in every sequence that has committed its `eos_id`."""
    ended = jnp.any((trace.tokens == eos_id[:, None]) & (trace.commit_step > 0) & ~trace.masked, -1, keepdims=True)
    later = jnp.arange(trace.masked.shape[1]) >= first[:, None]
    return dataclasses.replace(trace, masked=trace.masked & ~(ended & later))


def notify(callback: Callback | None, trace: Trace) -> None:
    """Calls the callback with the trace as numpy arrays, in order, while the device keeps running."""
    if callback is not None:
        jax.debug.callback(callback, trace, ordered=True)


@shape_checked
def fold_keys(keys: Key[Array, " b"], number: Int[Array | np.ndarray, " b"] | int) -> Key[Array, " b"]:
    """`number`, one per sequence or one for all, folded into each sequence's key: for a step, a position or a use."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, 0 if jnp.ndim(number) else None))(keys, number)


@shape_checked
def fold_position_keys(keys: Key[Array, " b"], positions: Int[Array, "b n"]) -> Key[Array, "b n"]:
    """One key per position, so what is drawn at a position depends on no other position."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, positions)
