"""The transformer as pure functions over a parameter tree.

Letters in shapes: b batch, n tokens, d width, h heads, g key-value heads, k head_dim, f mlp width, v vocabulary.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.attention.attend import attend
from dlm_jax.attention.plan import document_positions, prepare
from dlm_jax.attention.rules import Rule
from dlm_jax.mesh import BATCH, pin
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.sharding import gathered
from dlm_jax.models.weights import Params

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def forward(params: Params, tokens: jax.Array, *, config: ModelConfig, rule: Rule, segments: jax.Array | None = None,
            dtype: Any = jnp.float32, remat: str = "none") -> jax.Array:
    """Hidden states after the final norm: [b, n, d] in `dtype`.

    tokens: int [b, n] (for two streams n = 2L, [noisy || clean]); segments: int [b, n], the document of each token, 0
    for padding; positions restart with each document and, by the rule, with each stream.
    """
    positions = document_positions(rule, tokens.shape[1], segments)
    plan = prepare(rule, tokens.shape[1], segments)

    def body(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        x = layer(x, gathered(w, config, "layers"), positions, config, lambda q, k, v: attend(q, k, v, plan))
        return pin(x, BATCH, None, None), None

    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    params = cast(params, dtype)
    x = embed(params, tokens, positions)
    x, _ = jax.lax.scan(body, pin(x, BATCH, None, None), params["layers"])
    return norm(x, params["final_norm"], config)


@struct.dataclass
class Cache:
    """Keys and values of every layer and place: [depth, b, places, g, k]."""

    k: jax.Array
    v: jax.Array


def empty_cache(config: ModelConfig, batch: int, places: int, dtype: Any = jnp.float32) -> Cache:
    """A cache for `places` tokens of each sequence."""
    zeros = jnp.zeros((config.depth, batch, places, config.kv_heads, config.head_dim), dtype)
    return Cache(zeros, zeros)


def forward_cached(params: Params, tokens: jax.Array, cache: Cache, first: jax.Array | int, *, config: ModelConfig,
                   rule: Rule, segments: jax.Array | None = None,
                   write: jax.Array | None = None) -> tuple[jax.Array, Cache]:
    """Hidden states [b, n, d] of `tokens` standing at places first .. first + n, seeing the cache by `rule`.

    Their keys and values are written into the cache, which is returned; `write`, bool [b, n], leaves some of its places
    as they were (with a `first` that is an int). first: one number, or int [b]; segments: int [b, places]; each
    sequence is one document from place 0, so a place is a position. The cache is carried through the layers and not
    copied.
    """
    b, n = tokens.shape
    positions = jnp.atleast_1d(jnp.asarray(first, jnp.int32))[:, None] + jnp.arange(n, dtype=jnp.int32)
    plan = prepare(rule, cache.k.shape[2], segments, n, first)

    def put(whole: jax.Array, number: jax.Array, new: jax.Array) -> jax.Array:
        new = new.astype(whole.dtype)
        if write is not None:
            new = jnp.where(write[..., None, None], new, whole[number, :, first:first + n])
        return write_places(whole, number, new, first)

    def body(carry: tuple[jax.Array, Cache], layer_in: tuple[jax.Array, Params]) -> tuple[Any, None]:
        (x, cache), (number, w) = carry, layer_in
        written = {}

        def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            written["k"], written["v"] = put(cache.k, number, k), put(cache.v, number, v)
            return attend(q, written["k"][number], written["v"][number], plan)

        x = layer(x, w, positions, config, attend_cache)
        return (x, Cache(**written)), None

    params = cast(params, cache.k.dtype)
    layers = jnp.arange(config.depth), params["layers"]
    (x, cache), _ = jax.lax.scan(body, (embed(params, tokens, positions), cache), layers)
    return norm(x, params["final_norm"], config), cache


def write_places(cache: jax.Array, number: jax.Array, new: jax.Array, first: jax.Array | int) -> jax.Array:
    """`cache` [depth, b, places, g, k] with `new` [b, n, g, k] in layer `number`, from place `first` on: one number, or
    int [b]. In place, where XLA may: no axis is moved."""
    if jnp.ndim(first) == 0:
        return jax.lax.dynamic_update_slice(cache, new[None], (number, 0, first, 0, 0))
    b = len(new)
    where = jnp.stack([jnp.full(b, number), jnp.arange(b), first], -1)
    numbers = jax.lax.ScatterDimensionNumbers(update_window_dims=(1, 2, 3), inserted_window_dims=(0, 1),
                                              scatter_dims_to_operand_dims=(0, 1, 2))
    return jax.lax.scatter(cache, where, new, numbers, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP)


def unembed(params: Params, hidden: jax.Array, config: ModelConfig) -> jax.Array:
    """Logits in fp32: [..., v]."""
    if config.tied_head:
        table = params["embed"]["tokens"].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    head = params["head"]["weight"].astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


def embed(params: Params, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    """Token rows, plus the rows of learned positions where the family has them: [b, n, d].

    In a mesh each device looks up its columns of the rows of all, which are then exchanged: no table travels.
    """
    def rows(name: str, at: jax.Array) -> jax.Array:
        return pin(params["embed"][name][pin(at, "replica", None)], "replica", None, "fsdp")

    x = rows("tokens", tokens)
    return x + rows("positions", positions) if "positions" in params["embed"] else x


def layer(x: jax.Array, w: Params, positions: jax.Array, config: ModelConfig, attend: Attend) -> jax.Array:
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""
    x = x + attention(norm(x, w["attention_norm"], config), w["attention"], positions, config, attend)
    return x + mlp(norm(x, w["mlp_norm"], config), w["mlp"], config)


def attention(x: jax.Array, w: Params, positions: jax.Array, config: ModelConfig, attend: Attend) -> jax.Array:
    """Grouped-query self-attention; `attend` decides what is seen."""
    q, k, v = (linear(x, w[name]) for name in ("q", "k", "v"))
    if config.qk_norm:
        q, k = rms_norm(q, w["q_norm"]["scale"], config.norm_eps), rms_norm(k, w["k_norm"]["scale"], config.norm_eps)
    if config.rope is not None:
        angles = positions[..., None] * rope_frequencies(config.rope, config.head_dim)
        q, k = rotate(q, angles), rotate(k, angles)
    return linear(attend(q, k, v), w["o"], inputs=2)


def mlp(x: jax.Array, w: Params, config: ModelConfig) -> jax.Array:
    """GPT-2's gelu (tanh form) or SwiGLU (Shazeer 2020)."""
    up = linear(x, w["up"])
    gated = config.mlp == "swiglu"
    up = jax.nn.silu(linear(x, w["gate"])) * up if gated else jax.nn.gelu(up, approximate=True)
    return linear(up, w["down"])


def linear(x: jax.Array, w: Params, inputs: int = 1) -> jax.Array:
    """x times weight over the last `inputs` axes of x, plus the bias where there is one: [b, n, ...].

    As one plain matrix product: with the batch axes kept apart XLA's CPU compiler takes twice as long for gradients.
    """
    lead, outputs = x.shape[:x.ndim - inputs], w["weight"].shape[inputs:]
    y = x.reshape(math.prod(lead), -1) @ w["weight"].reshape(math.prod(x.shape[x.ndim - inputs:]), -1)
    y = y.reshape(*lead, *outputs)
    return y + w["bias"] if "bias" in w else y


def norm(x: jax.Array, w: Params, config: ModelConfig) -> jax.Array:
    """The family's norm, computed in fp32."""
    if config.norm == "rms":
        return rms_norm(x, w["scale"], config.norm_eps)
    y = at_least_fp32(x)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps)
    return y.astype(x.dtype) * w["scale"] + w["bias"]


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * scale (Zhang & Sennrich 2019), computed in fp32."""
    y = at_least_fp32(x)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale


def rope_frequencies(rope: Rope, head_dim: int) -> jax.Array:
    """Radians a position for each of the head_dim / 2 planes, fp32."""
    frequency = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_length * frequency / (2 * jnp.pi)  # full turns within the original context
        smooth = jnp.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
        return frequency * (smooth + (1 - smooth) / rope.factor)
    return frequency


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotates the planes (x_i, x_{i + k/2}) of x [b, n, h, k] by angles [b or 1, n, k/2] (the half-split layout)."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(at_least_fp32(x), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


def at_least_fp32(x: jax.Array) -> jax.Array:
    """fp32, or fp64 where the caller works in it."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cast(params: Params, dtype: Any) -> Params:
    """The parameters in the compute dtype; the masters stay as they are."""
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params)
