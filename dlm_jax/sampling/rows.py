"""Continuous batching: a batch whose rows are given to requests one by one, and taken back as each is finished.

All shapes are fixed, so nothing is compiled for a new request. A request's prompt is read on its own (`admit`); from
then on its row takes part in the common forward passes (`advance_rows`), in which rows share nothing. A prompt that
begins like one that a row still holds is not read again from the start: the keys and values are copied.

Letters: b rows, n positions of the canvas.
"""

import dataclasses
import functools
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dlm_jax import struct
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.transformer import Cache
from dlm_jax.models.weights import Params
from dlm_jax.sampling.cached_forward import CanvasModel, forward_block, prefill
from dlm_jax.sampling.engine import EngineState, canvas_model, new_engine_state, take_step
from dlm_jax.sampling.speculation import SpeculationState, advance, new_speculation_state, read_prompt
from dlm_jax.sampling.trace import Canvas, Sampler, new_trace, unfinished
from dlm_jax.sampling.unmasking import Speculate
from dlm_jax.typing import Bool, Int, Key

State = EngineState | SpeculationState
T = TypeVar("T")


@struct.dataclass
class Rows:
    """The batch. The caches of finished rows stay as they are until the row is given to another request."""

    canvas: Canvas  # as it was before anything was written
    keys: Key[Array, " b"]
    sampler: Sampler
    state: State


@functools.partial(jax.jit, static_argnames=("config", "spec"))
def new_rows(params: Params, canvas: Canvas, keys: Key[Array, " b"], sampler: Sampler, *, config: ModelConfig,
             spec: DiffusionSpec) -> Rows:
    """Rows for a canvas on which nothing has been read; one without masked positions is free."""
    model = canvas_model(params, canvas, sampler, config, spec)
    new_state = new_speculation_state if left_to_right(sampler) else new_engine_state
    return Rows(canvas, keys, sampler, new_state(model, new_trace(canvas), sampler))


class Newcomer(NamedTuple):
    """A request for a row, in numpy arrays, so that nothing is computed before `admit`."""

    canvas: Canvas  # of one sequence
    sampler: Sampler  # of one sequence
    seed: np.uint32
    number: np.uint32  # of its random stream
    row: np.int32  # that it gets
    source: np.int32  # the row whose prompt begins alike
    first: np.int32  # the position from which the prompt is read; what is before it, `source` knows


@functools.partial(jax.jit, static_argnames=("config", "spec", "length"), donate_argnames="rows")
def admit(params: Params, rows: Rows, new: Newcomer, *, config: ModelConfig, spec: DiffusionSpec, length: int) -> Rows:
    """The rows with a newcomer among them, its prompt read in a pass over `length` positions."""
    keys = jax.random.fold_in(jax.random.key(new.seed), new.number)[None]
    one = new_rows(params, new.canvas, keys, new.sampler, config=config, spec=spec)
    model = canvas_model(params, one.canvas, one.sampler, config, spec)
    state = with_caches(one.state, take_row(rows.state, new.source))
    first = jnp.asarray(new.first)
    if isinstance(state, SpeculationState):
        state = read_prompt(state, model, one.keys, one.sampler, first, length)
    elif one.sampler.caching.recompute != "canvas":
        forward = functools.partial(prefill, first=first, length=length)
        state = take_step(state, unfinished(state.trace), forward, model=model, fillable=one.canvas.masked,
                          keys=one.keys, sampler=one.sampler)
    return put_row(rows, dataclasses.replace(one, state=state), new.row)


@functools.partial(jax.jit, static_argnames=("config", "spec"), donate_argnames="rows")
def advance_rows(params: Params, rows: Rows, passes: Int[Array, ""], *, config: ModelConfig, spec: DiffusionSpec
                 ) -> tuple[Rows, Int[Array, ""]]:
    """The rows after at most so many forward passes, and no more once a row is finished; and how many there were."""
    model = canvas_model(params, rows.canvas, rows.sampler, config, spec)
    busy = unfinished(rows.state.trace)

    def goes_on(carry: tuple[State, Array]) -> Bool[Array, ""]:
        state, done = carry
        return jnp.any(busy) & (done < passes) & ~jnp.any(busy & ~unfinished(state.trace))

    def one_pass(carry: tuple[State, Array]) -> tuple[State, Array]:
        state, done = carry
        return forward_pass(state, model, rows), done + 1

    state, done = jax.lax.while_loop(goes_on, one_pass, (rows.state, jnp.int32(0)))
    return dataclasses.replace(rows, state=state), done


@functools.partial(jax.jit, donate_argnames="rows")
def release(rows: Rows, row: Int[Array, ""]) -> Rows:
    """The rows with `row` free: whatever it had still to fill stays unfilled."""
    trace = rows.state.trace
    trace = dataclasses.replace(trace, masked=trace.masked.at[row].set(False))
    return dataclasses.replace(rows, state=dataclasses.replace(rows.state, trace=trace))


def forward_pass(state: State, model: CanvasModel, rows: Rows) -> State:
    """One forward pass of the batch, after every row has read its prompt."""
    if isinstance(state, SpeculationState):
        return advance(state, model, rows.keys, rows.sampler)
    forward = prefill if rows.sampler.caching.recompute == "canvas" else forward_block
    return take_step(state, unfinished(state.trace), forward, model=model, fillable=rows.canvas.masked, keys=rows.keys,
                     sampler=rows.sampler)


def left_to_right(sampler: Sampler) -> bool:
    """Whether the sampler writes left to right (`speculation.py`)."""
    return isinstance(sampler.unmasking.selector, Speculate)


def with_caches(state: T, other: T) -> T:
    """`state` with the caches of `other`."""
    return jax.tree.map(lambda mine, its: its if isinstance(mine, Cache) else mine, state, other, is_leaf=is_cache)


def take_row(tree: T, row: Int[Array, ""] | np.int32) -> T:
    """One row of every array, as a batch of one."""
    return _by_row(lambda x, axis: jax.lax.dynamic_slice_in_dim(x, row, 1, axis), tree)


def put_row(tree: T, one: T, row: Int[Array, ""] | np.int32) -> T:
    """`tree` with a batch of one in place of a row."""
    return _by_row(lambda x, axis, new: jax.lax.dynamic_update_slice_in_dim(x, new, row, axis), tree, one)


def is_cache(tree: Any) -> bool:
    return isinstance(tree, Cache)


def _by_row(function: Any, tree: T, *others: T) -> T:
    """`function(array, axis of the rows, ...)` of every array: in a cache the layers come first."""
    def apply(x: Any, *rest: Any) -> Any:
        axis = 1 if is_cache(x) else 0
        return jax.tree.map(lambda *leaves: function(leaves[0], axis, *leaves[1:]), x, *rest)
    return jax.tree.map(apply, tree, *others, is_leaf=is_cache)
