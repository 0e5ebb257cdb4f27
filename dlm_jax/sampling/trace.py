"""What the sampler is given, and what it keeps of what it did."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.sampling.order import Order
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.reading import Caching, put, take


@struct.dataclass
class Canvas:
    """tokens: int [b, n]; masked: bool [b, n], the places the sampler fills; segments: int [b, n], 1, 0 for padding."""

    tokens: jax.Array
    masked: jax.Array
    segments: jax.Array


@struct.dataclass
class Sampler:
    """How to sample.

    steps: int [b], in how many denoising steps each sequence fills a block, or the canvas where there are none; end:
    int [b], the token that ends a sequence, -1 for none. They are data, so that other ones compile nothing.
    size: places of a block, 0 for the whole canvas. callback: told of every step.
    """

    steps: jax.Array
    end: jax.Array
    proposal: Proposal = struct.field(pytree_node=False)
    order: Order = struct.field(pytree_node=False)
    caching: Caching = struct.field(pytree_node=False)
    size: int = struct.field(pytree_node=False)
    callback: "Callback | None" = struct.field(pytree_node=False, default=None)


@struct.dataclass
class Trace:
    """What happened on the canvas.

    tokens: int [b, n]; masked: bool [b, n]; order: int [b, n], the denoising step of its sequence at which a place was
    last written, from 1, and 0 for given places; confidence: fp32 [b, n], the model's probability of a token when it
    was written; again: bool [b, n], places that were masked a second time. forwards: int [b], the passes of the model
    in which a sequence took part, prefill and the reading of finished blocks included; passes: int [b], those of its
    batch.
    """

    tokens: jax.Array
    masked: jax.Array
    order: jax.Array
    confidence: jax.Array
    again: jax.Array
    forwards: jax.Array
    passes: jax.Array

    def part(self, start: jax.Array, size: int) -> "Trace":
        """The places start .. start + size of each sequence; start: int [b]."""
        return dataclasses.replace(self, **{name: take(getattr(self, name), start, size) for name in PLACES})

    def with_part(self, part: "Trace", start: jax.Array) -> "Trace":
        """The inverse of `part`."""
        return dataclasses.replace(self, **{name: put(getattr(self, name), getattr(part, name), start)
                                            for name in PLACES})


PLACES = ("tokens", "masked", "order", "confidence", "again")  # the fields with an entry for each place
Callback = Callable[[Trace], None]


def new_trace(canvas: Canvas) -> Trace:
    """Nothing has happened yet."""
    b, _ = canvas.tokens.shape
    zeros = jnp.zeros(canvas.tokens.shape)
    return Trace(canvas.tokens, canvas.masked, zeros.astype(jnp.int32), zeros, zeros.astype(bool),
                 jnp.zeros(b, jnp.int32), jnp.zeros(b, jnp.int32))


def active(trace: Trace) -> jax.Array:
    """The sequences that are not yet complete: bool [b]."""
    return jnp.any(trace.masked, -1)


def stop_at_end(trace: Trace, place: jax.Array, end: jax.Array) -> Trace:
    """Gives up the places from `place`, int [b], on of every sequence that has committed its token `end`, int [b]."""
    ended = jnp.any((trace.tokens == end[:, None]) & (trace.order > 0) & ~trace.masked, -1, keepdims=True)
    later = jnp.arange(trace.masked.shape[1]) >= place[:, None]
    return dataclasses.replace(trace, masked=trace.masked & ~(ended & later))


def told(callback: Callback | None, trace: Trace) -> None:
    """Tells the callback of a step, with arrays of numpy, in order, while the device goes on."""
    if callback is not None:
        jax.debug.callback(callback, trace, ordered=True)


def fold(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Each sequence's key [b] for a pass, a place or a purpose: `number` is one for all, or int [b]."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, 0 if jnp.ndim(number) else None))(keys, number)


def fold_places(keys: jax.Array, places: jax.Array) -> jax.Array:
    """A key for each place, [b, n], of keys [b] and places int [b, n]: what is drawn at a place depends on no other."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))(keys, places)
