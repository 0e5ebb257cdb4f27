"""Forward passes of the sampler: over the whole canvas, or over a window of it against a key-value cache.

`CACHES` lists the cache policies. `block` is exact for block-causal models: nothing before a block changes once it is
finished, so a finished block goes through the model once more, clean, and then stays in the cache. In a bidirectional
model every key and value changes when any token does, so `prefix` and `dual` are approximations (Fast-dLLM, arXiv
2505.22618): the whole canvas is computed when a block starts, and until the block is full the keys and values before it
(`prefix`), or on both sides of it (`dual`), are reused from then.

Letters: b sequences, n positions of the canvas, w positions of the window (the block that a sequence is filling),
d width.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from dlm_jax import struct
from dlm_jax.attention.rules import Rule
from dlm_jax.attention.visibility import denoising_rule
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.transformer import Cache, empty_cache, forward, forward_cached
from dlm_jax.models.weights import Params
from dlm_jax.segments import Documents
from dlm_jax.typing import Bool, Float, Int, Shaped, shape_checked


@dataclasses.dataclass(frozen=True)
class CachePolicy:
    """What is recomputed at each step, and what is read from the cache."""

    rule: str | None = None  # the `DiffusionSpec.rule` it is for; None for any
    recompute: Literal["canvas", "block", "suffix"] = "canvas"  # what a step computes between two prefills
    # Whether one more forward pass caches a finished block, clean. Otherwise the next block starts with a prefill.
    recompute_clean: bool = False


CACHES = {
    "none": CachePolicy(),
    "block": CachePolicy("block_causal", "block", recompute_clean=True),
    "prefix": CachePolicy("bidirectional", "suffix"),
    "dual": CachePolicy("bidirectional", "block"),
}


@struct.dataclass
class CanvasModel:
    """A model together with the canvas it runs on."""

    params: Params
    segments: Int[Array, "b n"]  # int [b, n], 1 for text and 0 for padding
    documents: Documents  # those of `segments`
    origin: Int[Array, " b"]  # where the first block starts: see `first_blocks`
    config: ModelConfig = struct.field(pytree_node=False)
    spec: DiffusionSpec = struct.field(pytree_node=False)
    block_size: int = struct.field(pytree_node=False)  # w

    def block_start(self, index: Int[Array, " b"]) -> Int[Array, " b"]:
        """The first position of a block of each sequence."""
        return self.origin + index * self.block_size

    def rule(self, finished: Int[Array, " b"]) -> Rule:
        """Who sees whom when the first `finished` positions of each sequence are clean."""
        return denoising_rule(self.spec.visibility, self.spec.block_size, finished)


@struct.dataclass
class CacheState:
    """What one forward pass leaves for the next."""

    cache: Cache | None  # keys and values of the whole canvas, or None without a cache
    prev_hidden: Float[Array, "b d"]  # at the position before the window: predicts the window's first token if shifted


# What `prefill`, `forward_block` and `forward_suffix` (with its width bound) have in common:
# (model, tokens [b, n], start of the window [b], finished positions [b], cache state)
# -> (hidden states of the window [b, w, d], prev_hidden [b, d], cache state)
CachedForward = Callable[[CanvasModel, Array, Array, Array, CacheState], tuple[Array, Array, CacheState]]


@shape_checked
def first_blocks(masked: Bool[Array, "b n"], block_size: int, spec: DiffusionSpec) -> Int[Array, " b"]:
    """Where the blocks of each sequence are counted from.

    A block-causal model was trained with blocks that start at 0. The blocks of a bidirectional model exist for the
    sampler alone, and start with the first hole, which is the end of a prompt (LLaDA, Fast-dLLM).
    """
    if spec.rule == "bidirectional" and block_size < masked.shape[1]:
        return jnp.argmax(masked, -1).astype(jnp.int32)
    return jnp.zeros(len(masked), jnp.int32)


def empty_cache_state(model: CanvasModel, caching: CachePolicy) -> CacheState:
    """The state before the first forward pass."""
    b, n = model.segments.shape
    dtype = model.params["embed"]["tokens"].dtype
    cache = None if caching.recompute == "canvas" else empty_cache(model.config, b, n, dtype)
    return CacheState(cache, jnp.zeros((b, model.config.width), dtype))


@shape_checked
def prefill(model: CanvasModel, tokens: Int[Array, "b n"], start: Int[Array, " b"], finished: Int[Array, " b"],
            state: CacheState, first: Int[Array, ""] | int = 0, length: int | None = None
            ) -> tuple[Float[Array, "b w d"], Float[Array, "b d"], CacheState]:
    """The forward pass over the whole canvas; fills the cache if there is one.

    first, length: of the canvas, only the positions first .. first + length, where these hold every window and the
    position before it, nothing later is seen, and the cache knows what is before them.
    """
    rule = model.rule(finished)
    if state.cache is None:
        hidden, cache = forward(model.params, tokens, config=model.config, rule=rule, segments=model.segments,
                                documents=model.documents, dtype=state.prev_hidden.dtype), None
    else:
        read = jax.lax.dynamic_slice_in_dim(tokens, first, length or tokens.shape[1], axis=1)
        hidden, cache = forward_cached(model.params, read, state.cache, first, config=model.config, rule=rule,
                                       segments=model.segments, documents=model.documents)
    prev_hidden = slice_window(hidden, jnp.maximum(start - 1 - first, 0), 1)[:, 0]
    return slice_window(hidden, start - first, model.block_size), prev_hidden, CacheState(cache, prev_hidden)


@shape_checked
def forward_block(model: CanvasModel, tokens: Int[Array, "b n"], start: Int[Array, " b"], finished: Int[Array, " b"],
                  state: CacheState) -> tuple[Float[Array, "b w d"], Float[Array, "b d"], CacheState]:
    """The forward pass over the window against the cache; writes its keys and values into the cache."""
    assert state.cache is not None
    window = slice_window(tokens, start, model.block_size)
    hidden, cache = forward_cached(model.params, window, state.cache, start, config=model.config,
                                   rule=model.rule(finished), segments=model.segments, documents=model.documents)
    # Once the window is finished the next one starts behind it, so the last output here precedes that.
    prev_hidden = jnp.where((finished > start)[:, None], hidden[:, -1], state.prev_hidden)
    return hidden, state.prev_hidden, CacheState(cache, prev_hidden)


@shape_checked
def forward_suffix(model: CanvasModel, tokens: Int[Array, "b n"], start: Int[Array, " b"], finished: Int[Array, " b"],
                   state: CacheState, width: int
                   ) -> tuple[Float[Array, "b w d"], Float[Array, "b d"], CacheState]:
    """The forward pass over the last `width` positions of the canvas, which include the window. Before the window the
    cache keeps the keys and values of the last prefill."""
    assert state.cache is not None
    first = tokens.shape[1] - width
    from_window_on = first + jnp.arange(width) >= start[:, None]
    hidden, cache = forward_cached(model.params, tokens[:, first:], state.cache, first, config=model.config,
                                   rule=model.rule(finished), segments=model.segments, documents=model.documents,
                                   write=from_window_on)
    window = slice_window(hidden, start - first, model.block_size)
    return window, state.prev_hidden, CacheState(cache, state.prev_hidden)


@shape_checked
def slice_window(x: Shaped[Array, "b n *rest"], start: Int[Array, " b"], size: int
                 ) -> Shaped[Array, "b {size} *rest"]:
    """The positions start .. start + size of each sequence."""
    if size == x.shape[1]:
        return x
    return jax.vmap(lambda row, at: jax.lax.dynamic_slice_in_dim(row, at, size))(x, start)


@shape_checked
def update_window(x: Shaped[Array, "b n"], window: Shaped[Array, "b w"], start: Int[Array, " b"]
                  ) -> Shaped[Array, "b n"]:
    """`x` with `window` written at `start` of each sequence: the inverse of `slice_window`."""
    if window.shape == x.shape:
        return window
    return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, 0))(x, window, start)
