"""The cross-entropy of a batch whose tokens are shared out over devices: each makes the logits of its own."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from dlm_jax.diffusion.objective import cross_entropy_sums
from dlm_jax.mesh import AXES, BATCH, as_tuple, shares
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.sharding import spec_of
from dlm_jax.models.transformer import unembed
from dlm_jax.models.weights import Params, weight_table


def token_sums(params: Params, hidden: jax.Array, targets: jax.Array, weights: jax.Array,
               config: ModelConfig) -> jax.Array:
    """`cross_entropy_sums` of a model's head: fp32 [c] from hidden [b, n, d], targets int [b, n], weights fp32
    [c, b, n].

    In a mesh the head, which has fewer rows than a batch has tokens, is gathered once, and the gradients of all chunks
    of logits add up in fp32 on each device before they travel. The compiler, left to itself, moves them for each chunk.
    """
    path = "embed.tokens" if config.tied_head else "head.weight"
    group, name = path.split(".")

    def own(head: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        model = {group: {name: head}}
        return cross_entropy_sums(hidden, targets, weights, lambda h: unembed(model, h, config), config.vocab_size)

    arguments = params[group][name], hidden, targets, weights
    mesh = jax.sharding.get_abstract_mesh()
    if shares(*AXES) == 1 or AxisType.Manual in mesh.axis_types:
        return own(*arguments)
    cut = spec_of(path, weight_table(config)[path], mesh.shape)
    batch = BATCH if hidden.shape[0] % shares(*BATCH) == 0 else None
    text = "tensor" if hidden.shape[1] % shares("tensor") == 0 else None

    def share(head: jax.Array, hidden: jax.Array, *rest: jax.Array) -> jax.Array:
        return own(whole(head, tuple(cut), hidden.dtype), hidden, *rest)[:, None]

    tokens = PartitionSpec(batch, text)
    spread = jax.shard_map(share, in_specs=(cut, tokens, tokens, PartitionSpec(None, batch, text)), check_vma=False,
                           out_specs=PartitionSpec(None, (*(batch or ()), *([text] if text else []))))
    return jnp.sum(spread(*arguments), 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def whole(w: jax.Array, cut: tuple, dtype: Any) -> jax.Array:
    """A device's share of a weight, gathered as numbers of `dtype`. Gradients are summed into shares in their own."""
    gathered = w.astype(dtype)
    for axis, names in enumerate(cut):
        if names is not None:
            gathered = jax.lax.all_gather(gathered, as_tuple(names), axis=axis, tiled=True)
    return gathered.astype(w.dtype)


def _share(cut: tuple, dtype: Any, _: None, g: jax.Array) -> tuple[jax.Array]:
    for axis, names in enumerate(cut):
        if names is not None:
            g = jax.lax.psum_scatter(g, as_tuple(names), scatter_dimension=axis, tiled=True)
    return (g,)


whole.defvjp(lambda w, cut, dtype: (whole(w, cut, dtype), None), _share)
