"""The cross-entropy of a batch whose tokens are sharded over devices; each computes logits for its own tokens only.

Letters: b batch, n tokens, d width, c weightings.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jax.typing import DTypeLike

from dlm_jax.diffusion.cross_entropy import TokenLoss, cross_entropy_sums
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.sharding import partition_spec
from dlm_jax.models.transformer import unembed
from dlm_jax.models.weights import Params, weight_table
from dlm_jax.parallel.mesh import AXES, as_tuple, axis_size, batch_axes
from dlm_jax.typing import Array, Float, Float32, Hidden, Tokens, shape_checked

TOKEN_AXES = ("context", "tensor")  # what the tokens of a row are split over here


@shape_checked
def sharded_cross_entropy(params: Params, hidden: Hidden, targets: Tokens, weights: Float[Array, "c b n"],
                          config: ModelConfig, extra: TokenLoss | None = None) -> Float32[jax.Array, " sums"]:
    """`cross_entropy_sums` through the model's head: for each weighting, the sum over tokens of weight times
    cross-entropy; and with an `extra` loss, that of the first weighting.

    In a mesh the head, which has fewer rows than a batch has tokens, is gathered once, and the gradients of all chunks
    of logits add up in fp32 on each device before they travel. Left to itself, the compiler moves them for each chunk.
    """
    path = head_path(config)
    group, name = path.split(".")
    head = params[group][name]
    mesh = jax.sharding.get_abstract_mesh()
    if axis_size(*AXES) == 1 or AxisType.Manual in mesh.axis_types:
        return local_cross_entropy(head, hidden, targets, weights, config, extra)
    head_spec = partition_spec(path, weight_table(config)[path], mesh.shape)
    rows = batch_axes(hidden.shape[0])
    columns = TOKEN_AXES if hidden.shape[1] % axis_size(*TOKEN_AXES) == 0 else None
    tokens_spec = PartitionSpec(rows, columns)
    weights_spec = PartitionSpec(None, *tokens_spec)

    def local(shard: jax.Array, hidden: Array, targets: Array, weights: Array) -> jax.Array:
        head = all_gather_weight(shard, tuple(head_spec), hidden.dtype)
        return local_cross_entropy(head, hidden, targets, weights, config, extra)[:, None]

    sums = jax.shard_map(local, in_specs=(head_spec, tokens_spec, tokens_spec, weights_spec),
                         out_specs=PartitionSpec(None, (*as_tuple(rows), *as_tuple(columns))), check_vma=False)(
                             head, hidden, targets, weights)
    return jnp.sum(sums, 1)  # over devices


def head_path(config: ModelConfig) -> str:
    """The path of the weight that makes logits."""
    return "embed.tokens" if config.tied_head else "head.weight"


def local_cross_entropy(head: Array, hidden: Array, targets: Array, weights: Array, config: ModelConfig,
                        extra: TokenLoss | None) -> jax.Array:
    """`cross_entropy_sums` of a device's own tokens under the full head."""
    group, name = head_path(config).split(".")
    params = {group: {name: head}}
    return cross_entropy_sums(hidden, targets, weights, lambda h: unembed(params, h, config), config.vocab_size,
                              extra)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def all_gather_weight(w: jax.Array, spec: tuple, dtype: DTypeLike) -> jax.Array:
    """The full weight from a device's shard of it, inside a shard_map: sent in `dtype`, returned in the dtype of w.
    Gradients are reduce-scattered into shards in their own dtype."""
    gathered = w.astype(dtype)
    for axis, names in enumerate(spec):
        if names is not None:
            gathered = jax.lax.all_gather(gathered, as_tuple(names), axis=axis, tiled=True)
    return gathered.astype(w.dtype)


def _scatter_gradient(spec: tuple, dtype: DTypeLike, _: None, g: jax.Array) -> tuple[jax.Array]:
    for axis, names in enumerate(spec):
        if names is not None:
            g = jax.lax.psum_scatter(g, as_tuple(names), scatter_dimension=axis, tiled=True)
    return (g,)


all_gather_weight.defvjp(lambda w, spec, dtype: (all_gather_weight(w, spec, dtype), None), _scatter_gradient)
