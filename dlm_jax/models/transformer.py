"""The transformer as pure functions over a parameter tree.

Letters in shapes: b batch, n tokens, d width, h heads, g key-value heads, k head_dim, f mlp width, v vocabulary; and
of a cache: layers, s positions.
"""

import functools
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from dlm_jax import struct
from dlm_jax.attention.dispatch import attend, traced_platform
from dlm_jax.attention.plan import Plan, make_plan, split_plan
from dlm_jax.attention.qk_norm import norm_and_rotate_heads, rms_norm
from dlm_jax.attention.rope import at_least_fp32, rotate_heads
from dlm_jax.attention.rules import Rule
from dlm_jax.models.adapters import MaskAdapters
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.remat import remat_layer
from dlm_jax.models.sharding import gather_weights, merge_heads
from dlm_jax.models.weights import Params
from dlm_jax.parallel.context import deal, restore, splits_tokens
from dlm_jax.parallel.mesh import BATCH_AXES, WIDTH_AXES, constrain
from dlm_jax.segments import Documents, find_documents
from dlm_jax.typing import Array, Bool, Float, Float32, Int, Segments, Tokens, shape_checked

# A TPU takes fewer rows than this to its vector unit, which reads weights at half the speed of the matrix unit.
FEW_ROWS = 8
# So many sequences are written into a cache one by one: there a scatter is a loop, which costs more than it writes.
FEW_SEQUENCES = 16


class ForwardOptions(TypedDict, total=False):
    """How `forward` computes; neither changes what it computes."""

    dtype: DTypeLike  # of the computation, fp32 by default; norms are computed in fp32 in any case
    remat: str  # as `model.remat` of a config: see `remat.py`


@struct.dataclass
class Cache:
    """Keys and values of every layer and position. Their heads are one axis, as the projections leave them: on a TPU
    two axes have tiles of another shape, and the whole cache would be copied in every layer."""

    k: Float[jax.Array, "layers b s gk"]
    v: Float[jax.Array, "layers b s gk"]


# How strongly the mask adapters act on each token: by their scale on masks, not at all elsewhere.
Gate = Float[jax.Array, "b n 1"] | None
# (q, k, v) to the output of attention, and whatever keeps k and v: a `Cache`, or None.
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[Array, Any]]


@shape_checked
def forward(params: Params, tokens: Tokens, *, config: ModelConfig, rule: Rule, segments: Segments | None = None,
            documents: Documents | None = None, dtype: DTypeLike = jnp.float32, remat: str = "none"
            ) -> Float[jax.Array, "b n d"]:
    """Hidden states after the final norm, in `dtype`.

    For two streams n = 2L, [noisy || clean]. Positions restart with each document and, by the rule, with each stream.
    segments: the document of each token, 0 for padding. documents: those of the segments, where the caller has already
    found them.
    """
    n = tokens.shape[1]
    documents, split = documents or find_documents(n, segments, rule.stream_length(n)), splits_tokens(n)
    if split:
        tokens, segments, documents = jax.tree.map(deal, (tokens, segments, documents))
    positions, plan = documents.positions, make_plan(rule, n, segments, documents=documents)
    plan, gate = split_plan(plan) if split else plan, mask_gate(tokens, config.mask_adapters, dtype)

    def attend_plan(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Array, None]:
        return attend(q, k, v, plan), None

    def body(x: jax.Array, w: Params) -> tuple[jax.Array, None]:
        x, _ = layer(x, gather_weights(w, config, "layers"), positions, config, attend_plan, gate)
        return shard_tokens(x), None

    params = cast(params, dtype)
    x = shard_tokens(embed(params, tokens, positions, gate))
    x, _ = jax.lax.scan(remat_layer(body, remat, config.qk_norm), x, merge_heads(params["layers"], config, "layers"))
    x = norm(x, params["final_norm"], config)
    return restore(x) if split else x


def shard_tokens(x: jax.Array) -> jax.Array:
    """Activations [b, n, d] with their rows and tokens sharded over the devices."""
    return constrain(x, BATCH_AXES, "context" if splits_tokens(x.shape[1]) else None, None)


def empty_cache(config: ModelConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """A cache for `length` tokens of each of `batch` sequences."""
    zeros = jnp.zeros((config.depth, batch, length, config.kv_heads * config.head_dim), dtype)
    return Cache(zeros, zeros)


@shape_checked
def forward_cached(params: Params, tokens: Tokens, cache: Cache, first: Int[Array, ""] | Int[Array, " b"] | int, *,
                   config: ModelConfig, rule: Rule, segments: Int[Array, "b s"] | None = None,
                   documents: Documents | None = None, write: Bool[Array, "b n"] | None = None
                   ) -> tuple[Float[jax.Array, "b n d"], Cache]:
    """Hidden states of `tokens` at positions first .. first + n, which see the cache by `rule`, and the cache with
    their keys and values written into it.

    first: one number, or one per sequence. segments: of all positions of the cache; each sequence is one document from
    position 0. write: which positions to write; the others keep what they had (needs an int `first`). The cache is
    carried through the layers and not copied.
    """
    n = tokens.shape[1]
    positions = jnp.atleast_1d(jnp.asarray(first, jnp.int32))[:, None] + jnp.arange(n, dtype=jnp.int32)
    plan = make_plan(rule, cache.k.shape[2], segments, n, first, documents)
    return forward_planned(params, tokens, positions, cache, plan, config,
                           lambda cached, index, new: write_layer(cached, index, new, first, write))


def forward_planned(params: Params, tokens: Tokens, positions: Int[Array, "#b n"], cache: Cache, plan: Plan,
                    config: ModelConfig, write: Callable[[Array, Array, Array], jax.Array]
                    ) -> tuple[Float[jax.Array, "b n d"], Cache]:
    """`forward_cached` for tokens at any `positions`, which see the cache by `plan`, once `write(keys or values of the
    cache, index of the layer, those of the tokens)` has written theirs into it."""
    gate = mask_gate(tokens, config.mask_adapters, cache.k.dtype)

    def body(carry: tuple[jax.Array, Cache], inputs: tuple[jax.Array, Params]
             ) -> tuple[tuple[jax.Array, Cache], None]:
        (x, cache), (index, w) = carry, inputs

        def attend_cache(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[Array, Cache]:
            new = Cache(*(write(cached, index, x.reshape(*x.shape[:2], -1))
                          for cached, x in ((cache.k, k), (cache.v, v))))
            k, v = (read_layer(x, index).reshape(*x.shape[1:3], *k.shape[2:]) for x in (new.k, new.v))
            return attend(q, k, v, plan), new

        x, cache = layer(x, gather_weights(w, config, "layers"), positions, config, attend_cache, gate)
        return (shard_tokens(x), cache), None

    params = cast(params, cache.k.dtype)
    layers = jnp.arange(config.depth), merge_heads(params["layers"], config, "layers")
    x = shard_tokens(embed(params, tokens, positions, gate))
    (x, cache), _ = jax.lax.scan(body, (x, cache), layers)
    return norm(x, params["final_norm"], config), cache


def read_layer(cache: Float[Array, "layers b s gk"], index: Int[Array, ""]) -> Float[jax.Array, "b s gk"]:
    """One layer of `cache`. On a TPU the compiler would turn the whole of it around to suit the product with that
    layer, were it not for the barrier."""
    x = jnp.asarray(cache)[index]
    return jax.lax.optimization_barrier(x) if traced_platform() == "tpu" else x


@shape_checked
def write_layer(cache: Float[Array, "layers b s gk"], index: Int[Array, ""], new: Float[Array, "b n gk"],
                first: Int[Array, ""] | Int[Array, " b"] | int, write: Bool[Array, "b n"] | None = None
                ) -> Float[jax.Array, "layers b s gk"]:
    """`cache` with `new` in layer `index` from position `first` on; where `write` is False the old values stay.

    In place where XLA can: no axis is moved.
    """
    new, first = new.astype(cache.dtype), jnp.asarray(first)
    b, n = new.shape[:2]
    if write is not None:
        new = jnp.where(write[..., None], new, jax.lax.dynamic_slice_in_dim(cache[index], first, n, 1))
    if first.ndim == 0:
        return jax.lax.dynamic_update_slice(cache, new[None], (index, 0, first, 0))
    if b <= FEW_SEQUENCES and traced_platform() == "tpu":
        written = jnp.asarray(cache)
        for i in range(b):
            written = jax.lax.dynamic_update_slice(written, new[None, i:i + 1], (index, i, first[i], 0))
        return written
    where = jnp.stack([jnp.full(b, index), jnp.arange(b), first], -1)
    numbers = jax.lax.ScatterDimensionNumbers(update_window_dims=(1, 2), inserted_window_dims=(0, 1),
                                              scatter_dims_to_operand_dims=(0, 1, 2))
    return jax.lax.scatter(cache, where, new, numbers, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP)


@shape_checked
def unembed(params: Params, hidden: Float[Array, "*n d"], config: ModelConfig) -> Float32[jax.Array, "*n v"]:
    """Logits."""
    if config.tied_head:
        table = params["embed"]["tokens"].astype(hidden.dtype)
        return jnp.einsum("...d,vd->...v", hidden, table, preferred_element_type=jnp.float32)
    head = params["head"]["weight"].astype(hidden.dtype)
    return jnp.einsum("...d,dv->...v", hidden, head, preferred_element_type=jnp.float32)


@shape_checked
def mask_gate(tokens: Tokens, adapters: MaskAdapters | None, dtype: DTypeLike) -> Gate:
    """The gate of a model's mask adapters, or None if it has none."""
    if adapters is None:
        return None
    return (adapters.scale * (tokens == adapters.mask_token_id)).astype(dtype)[..., None]


@shape_checked
def embed(params: Params, tokens: Tokens, positions: Int[Array, "#b n"], gate: Gate = None
          ) -> Float[jax.Array, "b n d"]:
    """Token embeddings, plus learned position embeddings where the family has them.

    In a mesh each device looks up its own columns for every token, and these are then exchanged: no table travels.
    """
    def rows(name: str, index: Array) -> jax.Array:
        return constrain(params["embed"][name][constrain(index, "replica", None)], "replica", None, WIDTH_AXES)

    x = rows("tokens", tokens)
    if gate is not None:
        x = x + gate * params["embed"]["mask"]
    return x + rows("positions", positions) if "positions" in params["embed"] else x


@shape_checked
def layer(x: Float[jax.Array, "b n d"], w: Params, positions: Int[Array, "#b n"], config: ModelConfig, attend: Attend,
          gate: Gate = None) -> tuple[Float[jax.Array, "b n d"], Any]:
    """One pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); and the cache that `attend` returns."""
    y, cache = attention(norm(x, w["attention_norm"], config), w["attention"], positions, config, attend, gate)
    x = x + y
    return x + mlp(norm(x, w["mlp_norm"], config), w["mlp"], config, gate), cache


@shape_checked
def attention(x: Float[jax.Array, "b n d"], w: Params, positions: Int[Array, "#b n"], config: ModelConfig,
              attend: Attend, gate: Gate = None) -> tuple[Float[jax.Array, "b n d"], Any]:
    """Grouped-query self-attention, and the cache that `attend` returns.

    `attend` decides which keys each query sees: (q [b, n, h, k], k and v [b, n, g, k]) to (out [b, n, h, k], cache).
    """
    q, k, v = (linear(x, w[name], gate) for name in ("q", "k", "v"))
    if config.qk_norm:
        q, k = checkpoint_name(q, "qk_proj"), checkpoint_name(k, "qk_proj")
    q, k, v = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in (q, k, v))
    if config.rope is not None:
        angles = positions[..., None] * rope_frequencies(config.rope, config.head_dim)
        q, k = (norm_and_rotate_heads(q, k, w["q_norm"]["scale"], w["k_norm"]["scale"], angles, config.norm_eps)
                if config.qk_norm else rotate_heads(q, k, angles))
    out, cache = attend(q, k, v)
    return checkpoint_name(linear(out.reshape(*x.shape[:2], -1), w["o"], gate), "out_proj"), cache


@shape_checked
def mlp(x: Float[jax.Array, "b n d"], w: Params, config: ModelConfig, gate: Gate = None) -> Float[jax.Array, "b n d"]:
    """GPT-2's gelu (tanh form) or SwiGLU (Shazeer 2020)."""
    up = checkpoint_name(linear(x, w["up"], gate), "mlp_in")
    if config.mlp == "swiglu":
        up = jax.nn.silu(checkpoint_name(linear(x, w["gate"], gate), "mlp_in")) * up
    else:
        up = jax.nn.gelu(up, approximate=True)
    return linear(up, w["down"], gate)


@shape_checked
def linear(x: Float[Array, "b n inputs"], w: Params, gate: Gate = None) -> Float[jax.Array, "b n outputs"]:
    """x times the weight, plus the bias where there is one, plus gate * x A B where the weight has an adapter. Heads
    and head_dim, if they are two axes of the weight, count as one.

    It is one plain matrix product: with separate batch axes XLA's CPU compiler takes twice as long for gradients.
    """
    b, n, inputs = x.shape
    rows = jnp.asarray(x).reshape(b * n, inputs)
    if b * n < FEW_ROWS and traced_platform() == "tpu":
        rows = jnp.pad(rows, ((0, FEW_ROWS - b * n), (0, 0)))

    def times(*matrices: Array) -> jax.Array:
        return functools.reduce(jnp.matmul, matrices, rows)[:b * n].reshape(b, n, -1)

    y = times(w["weight"].reshape(inputs, -1))
    y = y + w["bias"].reshape(-1) if "bias" in w else y
    if gate is None or "a" not in w:
        return y
    rank = w["b"].shape[0]
    return y + gate * times(w["a"].reshape(inputs, rank), w["b"].reshape(rank, -1))


@shape_checked
def norm(x: Float[jax.Array, "*n d"], w: Params, config: ModelConfig) -> Float[jax.Array, "*n d"]:
    """The family's norm, computed in fp32."""
    if config.norm == "rms":
        return rms_norm(x, w["scale"], config.norm_eps)
    y = at_least_fp32(x)
    y = y - jnp.mean(y, -1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + config.norm_eps)
    return y.astype(x.dtype) * w["scale"] + w["bias"]


def rope_frequencies(rope: Rope, head_dim: int) -> Float32[jax.Array, " planes"]:
    """Radians per position for each of the head_dim / 2 planes."""
    frequency = rope.theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if rope.scaling == "linear":
        return frequency / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_length * frequency / (2 * jnp.pi)  # full turns within the original context
        smooth = jnp.clip((turns - rope.low_factor) / (rope.high_factor - rope.low_factor), 0.0, 1.0)
        return frequency * (smooth + (1 - smooth) / rope.factor)
    return frequency


def cast(params: Params, dtype: DTypeLike) -> Params:
    """The parameters in the compute dtype; the master copies stay as they are."""
    return jax.tree.map(lambda w: jnp.asarray(w, dtype), params)
