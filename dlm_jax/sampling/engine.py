"""The sampler's engine: one jitted loop in which every sequence is at its own block and at its own step.

A step runs the model on each sequence's window (its block; the whole canvas where there are no blocks), proposes a
token for every position of it, commits those that the unmasking strategy selects, and advances. Sequences of a batch
share only the loop: each commits the same tokens, in as many forward passes, as it would alone.

Letters: b sequences, n positions of the canvas, w positions of the window, d width, v vocabulary.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh, PartitionSpec

from dlm_jax import struct
from dlm_jax.diffusion.cross_entropy import shift
from dlm_jax.diffusion.guidance import guide
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.transformer import unembed
from dlm_jax.models.weights import Params
from dlm_jax.sampling.cached_forward import (
    CachedForward,
    CacheState,
    CanvasModel,
    empty_cache_state,
    first_blocks,
    forward_block,
    forward_suffix,
    prefill,
    slice_window,
)
from dlm_jax.sampling.proposal import without
from dlm_jax.sampling.selector import View
from dlm_jax.sampling.speculation import write_left_to_right
from dlm_jax.sampling.trace import (
    Canvas,
    Sampler,
    Trace,
    count_forward,
    fold_keys,
    fold_position_keys,
    new_trace,
    notify,
    stop_at_end,
    unfinished,
)
from dlm_jax.sampling.unmasking import Speculate
from dlm_jax.segments import find_documents
from dlm_jax.typing import Bool, Float, Float32, Int, Key, shape_checked


@functools.partial(jax.jit, static_argnames=("config", "spec", "mesh"))
@shape_checked
def run(params: Params, canvas: Canvas, keys: Key[Array, " b"], sampler: Sampler, *, config: ModelConfig,
        spec: DiffusionSpec, mesh: Mesh | None = None) -> Trace:
    """Fills the canvas, which has room for every block with a masked position. keys: one per sequence.

    mesh: has one axis, whose size divides b. Each device runs its own loop over its sequences; they do not communicate.
    """
    fill_canvas = functools.partial(fill_shard, config=config, spec=spec)
    if mesh is not None:
        by_sequence = PartitionSpec(mesh.axis_names[0])
        fill_canvas = jax.shard_map(fill_canvas, mesh=mesh,
                                    in_specs=(PartitionSpec(), by_sequence, by_sequence, by_sequence),
                                    out_specs=by_sequence, check_vma=False)
    return fill_canvas(params, canvas, keys, sampler)


def fill_shard(params: Params, canvas: Canvas, keys: Key[Array, " b"], sampler: Sampler, *, config: ModelConfig,
               spec: DiffusionSpec) -> Trace:
    """`run` for the sequences of one device."""
    model = canvas_model(params, canvas, sampler, config, spec)
    fill = write_left_to_right if isinstance(sampler.unmasking.selector, Speculate) else denoise
    return fill(model, new_trace(canvas), keys, sampler)


def canvas_model(params: Params, canvas: Canvas, sampler: Sampler, config: ModelConfig, spec: DiffusionSpec
                 ) -> CanvasModel:
    """The model on the canvas as it is before anything is written."""
    n = canvas.tokens.shape[1]
    block_size = sampler.block_size or n
    origin = first_blocks(canvas.masked, block_size, spec)
    return CanvasModel(params, canvas.segments, find_documents(n, canvas.segments), origin, config, spec, block_size)


@struct.dataclass
class EngineState:
    """The loop carry."""

    trace: Trace
    cache_state: CacheState
    block_index: Int[Array, " b"]  # the block that each sequence is filling
    step: Int[Array, " b"]  # denoising steps taken in that block
    steps_taken: Int[Array, " b"]  # denoising steps taken in all blocks
    stale: Bool[Array, " b"]  # the cache is out of date: the sequence needs a prefill before its next step


def denoise(model: CanvasModel, trace: Trace, keys: Key[Array, " b"], sampler: Sampler) -> Trace:
    """Repeats until nothing is masked: one step with a prefill, then cached steps until every sequence needs the next
    prefill."""
    step = functools.partial(take_step, model=model, fillable=trace.masked, keys=keys, sampler=sampler)

    def cached_steps(state: EngineState, forward: CachedForward) -> EngineState:
        return jax.lax.while_loop(lambda s: jnp.any(can_continue(s)), lambda s: step(s, can_continue(s), forward),
                                  state)

    def outer_step(state: EngineState) -> EngineState:
        # Of a block-causal model the first blocks see nothing after them, and later ones are computed when they come.
        first_pass = functools.partial(prefill, length=sampler.prompt_length or None)
        state = step(state, unfinished(state.trace), first_pass)
        if sampler.caching.recompute == "block":
            return cached_steps(state, forward_block)
        if sampler.caching.recompute == "suffix":
            index, forwards = suffix_forwards(state, model)
            branches = [functools.partial(cached_steps, forward=forward) for forward in forwards]
            return jax.lax.switch(index, branches, state)
        return state

    return jax.lax.while_loop(lambda s: jnp.any(unfinished(s.trace)), outer_step,
                              new_engine_state(model, trace, sampler)).trace


def new_engine_state(model: CanvasModel, trace: Trace, sampler: Sampler) -> EngineState:
    """The state before the first step."""
    zeros = jnp.zeros(len(trace.tokens), jnp.int32)
    return EngineState(trace, empty_cache_state(model, sampler.caching), next_block(trace.masked, model), step=zeros,
                       steps_taken=zeros, stale=jnp.ones_like(zeros, bool))


def suffix_forwards(state: EngineState, model: CanvasModel) -> tuple[Int[Array, ""], list[CachedForward]]:
    """Forward passes over the last quarter, the last half and all of the canvas, and the index of the shortest one that
    holds the window of every sequence that can continue."""
    n = state.trace.tokens.shape[1]
    first = jnp.min(jnp.where(can_continue(state), model.block_start(state.block_index), n))
    widths = [width for width in (n // 4, n // 2, n) if width >= model.block_size]
    index = sum(((n - first > width).astype(jnp.int32) for width in widths[:-1]), jnp.int32(0))
    return index, [functools.partial(forward_suffix, width=width) for width in widths]


@shape_checked
def can_continue(state: EngineState) -> Bool[Array, " b"]:
    """The sequences whose next step can use the cache."""
    return unfinished(state.trace) & ~state.stale


@shape_checked
def next_block(masked: Bool[Array, "b n"], model: CanvasModel) -> Int[Array, " b"]:
    """The first block of each sequence that has a masked position; 0 if there is none."""
    return jnp.maximum(jnp.argmax(masked, -1).astype(jnp.int32) - model.origin, 0) // model.block_size


@shape_checked
def take_step(state: EngineState, active: Bool[Array, " b"], forward: CachedForward, *, model: CanvasModel,
              fillable: Bool[Array, "b n"], keys: Key[Array, " b"], sampler: Sampler) -> EngineState:
    """One forward pass of the batch: runs the model on the windows, commits tokens there, and advances.

    active: the sequences that take part; the others write nothing and stay where they are.
    fillable: [b, n], the positions that were masked at the start.
    """
    start = model.block_start(state.block_index)
    window = state.trace.window(start, model.block_size)
    # Nothing was left to commit: this forward pass only caches the finished block (`CachePolicy.recompute_clean`).
    already_full = ~jnp.any(window.masked, -1)

    hidden, cache_state = forward_window(state, start, already_full, forward, model)
    logits = unembed(model.params, hidden, model.config)
    if sampler.cfg_scale:
        without_prompt = mask_prompt(state, fillable, model)
        hidden, _ = forward_window(without_prompt, start, already_full, forward, model)
        logits = guide(logits, unembed(model.params, hidden, model.config), sampler.cfg_scale)
    step_keys = fold_keys(keys, state.trace.nfe)
    window_fillable = slice_window(fillable, start, model.block_size)
    steps = block_steps(sampler.steps, window_fillable, fillable)
    view = predict(logits, window, window_fillable, step_keys, steps, state.step, model, sampler)

    window = commit(window, view, active, state.steps_taken + 1, sampler)
    trace = count_forward(state.trace.with_window(window, start), active, passes=2 if sampler.cfg_scale else 1)
    notify(sampler.callback, trace)

    state = dataclasses.replace(state, trace=trace, cache_state=cache_state)
    return advance(state, active, already_full, ~jnp.any(window.masked, -1), model, sampler)


@shape_checked
def block_steps(steps: Int[Array, " b"], window_fillable: Bool[Array, "b w"], fillable: Bool[Array, "b n"]
                ) -> Int[Array, " b"]:
    """The denoising steps of the current block, rounded up: its share of the positions to fill of those of the text."""
    in_block, in_all = jnp.sum(window_fillable, -1), jnp.maximum(jnp.sum(fillable, -1), 1)
    # ceil(steps * in_block / in_all), whose product may exceed int32 in a long text.
    return steps // in_all * in_block - (-(steps % in_all * in_block) // in_all)


def forward_window(state: EngineState, start: Int[Array, " b"], already_full: Bool[Array, " b"],
                   forward: CachedForward, model: CanvasModel) -> tuple[Float[Array, "b w d"], CacheState]:
    """The hidden states that predict the window's tokens, and the cache after this forward pass."""
    mask_id = model.spec.mask_token_id
    assert mask_id is not None, "a model that denoises has a mask token"
    tokens = jnp.where(state.trace.masked, mask_id, state.trace.tokens)
    finished = jnp.where(already_full, start + model.block_size, start)
    hidden, prev_hidden, cache_state = forward(model, tokens, start, finished, state.cache_state)
    return (shift(hidden, prev_hidden) if model.spec.alignment == "shifted" else hidden), cache_state


def mask_prompt(state: EngineState, fillable: Bool[Array, "b n"], model: CanvasModel) -> EngineState:
    """The state with its prompt masked as well: `fillable` are the positions outside the prompt and padding."""
    prompt = (model.segments > 0) & ~fillable
    return dataclasses.replace(state, trace=dataclasses.replace(state.trace, masked=state.trace.masked | prompt))


@shape_checked
def predict(logits: Float32[Array, "b w v"], window: Trace, fillable: Bool[Array, "b w"], keys: Key[Array, " b"],
            steps: Int[Array, " b"], step: Int[Array, " b"], model: CanvasModel, sampler: Sampler) -> View:
    """What the model proposes for the window, as the unmasking strategy sees it.

    step, steps: denoising steps taken in the block, and in all.
    """
    logits = without(logits, model.spec.mask_token_id, *sampler.suppress_tokens)
    offsets = jnp.broadcast_to(jnp.arange(logits.shape[1]), logits.shape[:2])
    tokens, confidence = sampler.proposal(fold_position_keys(fold_keys(keys, 0), offsets), logits)
    steps_left = jnp.maximum(steps - step, 1)
    return View(fold_keys(keys, 1), logits, tokens, confidence, window.masked, fillable, jnp.maximum(steps, 1)[:, None],
                steps_left[:, None])


@shape_checked
def commit(window: Trace, view: View, active: Bool[Array, " b"], step: Int[Array, " b"], sampler: Sampler) -> Trace:
    """The window after the `active` sequences have committed the selected proposals and made their revisions.

    step: recorded as the commit step of what is written.
    """
    assert not isinstance(sampler.unmasking.selector, Speculate)
    chosen = sampler.unmasking.selector(view) & active[:, None]
    # Revisions apply to tokens the sampler wrote earlier, never to the prompt, and only while the block is not full.
    filling = active & jnp.any(window.masked, -1)
    revisable = filling[:, None] & view.fillable & ~window.masked
    masked, remasked = window.masked & ~chosen, window.remasked
    for revision in sampler.unmasking.revisions:
        revised = revisable & revision(window.tokens, view)
        if revision.masks:
            revised &= ~remasked
            masked, remasked = masked | revised, remasked | revised
        else:
            chosen |= revised
    return dataclasses.replace(
        window, tokens=jnp.where(chosen, view.tokens, window.tokens), masked=masked, remasked=remasked,
        commit_step=jnp.where(chosen, step[:, None], window.commit_step),
        confidence=jnp.where(chosen, view.confidence, window.confidence))


@shape_checked
def advance(state: EngineState, active: Bool[Array, " b"], already_full: Bool[Array, " b"],
            now_full: Bool[Array, " b"], model: CanvasModel, sampler: Sampler) -> EngineState:
    """Counts the step, moves sequences whose block is done to their next block, and stops those that have ended.

    already_full, now_full: whether the block had no masked position before this step, and has none after it.
    """
    recompute_clean = sampler.caching.recompute_clean
    # Once a block is full, an end token in it leaves everything after the block unfilled.
    canvas_end = state.trace.tokens.shape[1]
    stop_from = jnp.where(now_full, model.block_start(state.block_index + 1), canvas_end)
    trace = stop_at_end(state.trace, stop_from, sampler.eos_id)
    # A block is done when it is full, or, where full blocks are cached by one more forward pass, after that pass.
    block_done = active & (already_full if recompute_clean else now_full)
    following = state.block_index + 1 if recompute_clean else next_block(trace.masked, model)
    # A forward pass that only caches a finished block is no denoising step.
    denoised = active & ~already_full
    # Without that pass, the cache does not know the finished block: the next block starts with a prefill, for which a
    # sequence waits while others of its batch fill theirs.
    stale = jnp.zeros_like(block_done) if recompute_clean else jnp.where(active, block_done, state.stale)
    return EngineState(trace, state.cache_state, block_index=jnp.where(block_done, following, state.block_index),
                       step=jnp.where(block_done, 0, state.step + active.astype(jnp.int32)),
                       steps_taken=state.steps_taken + denoised.astype(jnp.int32), stale=stale)
