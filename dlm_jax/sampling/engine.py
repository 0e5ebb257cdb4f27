"""The sampler's engine: one jitted loop in which every sequence is at its own block and at its own step.

A step reads the model at the places that a sequence has in work (its block; the whole canvas where there are no
blocks), proposes a token for each, and commits those that the selector takes. Sequences of a batch share nothing but
the loop: what one commits, and how many passes it takes part in, is what it would commit and take alone.

Letters: b sequences, n places of the canvas, B places in work, v vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from dlm_jax.diffusion.objective import shift
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import unembed
from dlm_jax.models.weights import Params
from dlm_jax.sampling.order import Speculate
from dlm_jax.sampling.proposal import without
from dlm_jax.sampling.reading import Memory, Model, Read, empty_memory, read_block, read_suffix, read_whole, take
from dlm_jax.sampling.selector import View
from dlm_jax.sampling.speculation import write_left_to_right
from dlm_jax.sampling.trace import (
    Canvas,
    Sampler,
    Trace,
    active,
    fold,
    fold_places,
    new_trace,
    stop_at_end,
    told,
)


@functools.partial(jax.jit, static_argnames=("config", "card", "mesh"))
def run(params: Params, canvas: Canvas, keys: jax.Array, sampler: Sampler, *, config: ModelConfig, card: Card,
        mesh: Mesh | None = None) -> Trace:
    """Fills the canvas. keys: [b], one a sequence; a block divides n. The devices of the mesh, which has one axis and
    divides b, each have their share of the sequences and a loop of their own, with nothing to send."""
    fill_canvas = functools.partial(fill, config=config, card=card)
    if mesh is not None:
        share = PartitionSpec(mesh.axis_names[0])
        fill_canvas = jax.shard_map(fill_canvas, mesh=mesh, in_specs=(PartitionSpec(), share, share, share),
                                    out_specs=share, check_vma=False)
    return fill_canvas(params, canvas, keys, sampler)


def fill(params: Params, canvas: Canvas, keys: jax.Array, sampler: Sampler, *, config: ModelConfig,
         card: Card) -> Trace:
    """`run`, on one device."""
    size = sampler.size or canvas.tokens.shape[1]
    model = Model(params, canvas.segments, config, card, size)
    left_to_right = isinstance(sampler.order.selector, Speculate)
    return (write_left_to_right if left_to_right else denoise)(model, new_trace(canvas), keys, sampler)


@struct.dataclass
class State:
    """Between two steps; what is not in `trace` is int or bool [b].

    block: which is in work; step: denoising steps made in it; made: in all; stale: the whole canvas is to be read again
    before this sequence goes on.
    """

    trace: Trace
    memory: Memory
    block: jax.Array
    step: jax.Array
    made: jax.Array
    stale: jax.Array


def denoise(model: Model, trace: Trace, keys: jax.Array, sampler: Sampler) -> Trace:
    """Rounds until nothing is masked: the whole canvas is read, and then what the cache leaves to be read, until every
    sequence needs the whole again."""
    b, n = trace.tokens.shape
    step = functools.partial(make_step, model=model, canvas=trace.masked, keys=keys, sampler=sampler)

    def steps(state: State, read: Read) -> State:
        return jax.lax.while_loop(lambda s: jnp.any(ready(s)), lambda s: step(s, ready(s), read), state)

    def a_round(state: State) -> State:
        state = step(state, active(state.trace), read_whole)
        if sampler.caching.window == "block":
            return steps(state, read_block)
        if sampler.caching.window == "suffix":
            first = jnp.min(jnp.where(ready(state), state.block * model.size, n))
            widths = [width for width in (n // 4, n // 2, n) if width >= model.size]
            reads = [functools.partial(read_suffix, width=width) for width in widths]
            index = sum((n - first > width).astype(jnp.int32) for width in widths[:-1])
            return jax.lax.switch(index, [functools.partial(steps, read=read) for read in reads], state)
        return state

    zeros = jnp.zeros(b, jnp.int32)
    start = State(trace, empty_memory(model, sampler.caching), next_block(trace.masked, model.size), zeros, zeros,
                  jnp.ones(b, bool))
    return jax.lax.while_loop(lambda s: jnp.any(active(s.trace)), a_round, start).trace


def ready(state: State) -> jax.Array:
    """Which sequences can go on without the whole canvas being read: bool [b]."""
    return active(state.trace) & ~state.stale


def next_block(masked: jax.Array, size: int) -> jax.Array:
    """The first block of each sequence that has a masked place: int [b]."""
    return jnp.argmax(masked, -1).astype(jnp.int32) // size


def make_step(state: State, going: jax.Array, read: Read, *, model: Model, canvas: jax.Array, keys: jax.Array,
              sampler: Sampler) -> State:
    """One pass of the model, for the sequences that are `going`."""
    start, size, mask_id = state.block * model.size, model.size, model.card.mask_token_id
    assert mask_id is not None, "a model that denoises has a mask token"
    part = state.trace.part(start, size)
    finished = ~jnp.any(part.masked, -1)  # this pass reads the block clean, and commits nothing
    tokens = jnp.where(state.trace.masked, mask_id, state.trace.tokens)
    hidden, before, memory = read(model, tokens, start, jnp.where(finished, start + size, start), state.memory)
    if model.card.alignment == "shifted":
        hidden = shift(hidden, before)
    pass_keys = fold(keys, state.trace.forwards)
    view = look(hidden, part, take(canvas, start, size), pass_keys, state.step, model, sampler)
    part = commit(part, view, going[:, None], state.made[:, None] + 1, sampler)
    going_on = going.astype(jnp.int32)
    trace = state.trace.with_part(part, start)
    trace = dataclasses.replace(trace, forwards=trace.forwards + going_on, passes=trace.passes + 1)
    told(sampler.callback, trace)
    done = going & (finished if sampler.caching.finishes else ~jnp.any(part.masked, -1))
    trace = stop_at_end(trace, jnp.where(~jnp.any(part.masked, -1), start + size, trace.tokens.shape[1]), sampler.end)
    following = state.block + 1 if sampler.caching.finishes else next_block(trace.masked, size)
    return State(trace, memory, jnp.where(done, following, state.block), jnp.where(done, 0, state.step + going_on),
                 state.made + going_on * ~finished, done & (not sampler.caching.finishes))


def look(hidden: jax.Array, part: Trace, canvas: jax.Array, keys: jax.Array, step: jax.Array, model: Model,
         sampler: Sampler) -> View:
    """What the model says of the places in work."""
    logits = without(unembed(model.params, hidden, model.config), model.card.mask_token_id)
    places = jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape[:2])
    tokens, confidence = sampler.proposal(fold_places(fold(keys, 0), places), logits)
    steps_left = jnp.maximum(sampler.steps - step, 1)
    return View(fold(keys, 1), logits, tokens, confidence, part.masked, canvas, sampler.steps[:, None],
                steps_left[:, None])


def commit(part: Trace, view: View, going: jax.Array, order: jax.Array, sampler: Sampler) -> Trace:
    """Writes the proposals that the selector takes, and makes the revisions, in the sequences that are `going`."""
    assert not isinstance(sampler.order.selector, Speculate)
    chosen = sampler.order.selector(view) & going
    open_ = going & jnp.any(part.masked, -1, keepdims=True) & view.canvas & ~part.masked
    masked, again = part.masked & ~chosen, part.again
    for revision in sampler.order.revisions:
        places = open_ & revision(part.tokens, view)
        if revision.masks:
            places &= ~again
            masked, again = masked | places, again | places
        else:
            chosen |= places
    return dataclasses.replace(
        part, tokens=jnp.where(chosen, view.tokens, part.tokens), masked=masked, again=again,
        order=jnp.where(chosen, order, part.order), confidence=jnp.where(chosen, view.confidence, part.confidence))

