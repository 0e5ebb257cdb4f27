"""Where each weight lies in the mesh, from the meaning of its axes in the one weight table."""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax.mesh import as_tuple, pin
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params, Weight, flatten, map_table, unflatten, weight_table

# The axis of the mesh that cuts an axis of a matrix. Heads and mlp are cut together by `tensor`, so that a layer needs
# one sum over it after each of its two halves; `fsdp` cuts the width, which is gathered just before use.
CUTS = {"vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor"}
# An untied head is cut along the vocabulary by all, where that divides it: cut along the width, its gradient would be
# moved whole.
HEAD_CUTS = {"vocab": ("fsdp", "tensor")}


def spec_of(path: str, weight: Weight, sizes: Mapping[str, int]) -> PartitionSpec:
    """The layout of a weight in a mesh of these sizes. What is no matrix, and an axis that the mesh does not divide, is
    kept whole by every device."""
    def fitting(cuts: Mapping[str, Any]) -> PartitionSpec:
        spec = []
        for axis, size in zip(weight.axes, weight.shape):
            cut = cuts.get(axis)
            divides = cut is not None and size % math.prod(sizes.get(name, 1) for name in as_tuple(cut)) == 0
            spec.append(cut if divides else None)
        return PartitionSpec(*spec)

    if not weight.decays:
        return PartitionSpec()
    by_vocabulary = fitting(HEAD_CUTS)
    return by_vocabulary if path == "head.weight" and any(by_vocabulary) else fitting(CUTS)


def param_specs(config: ModelConfig) -> Params:
    """The layout of all parameters, in the mesh that is set: a tree of `PartitionSpec`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return map_table(config, lambda path, w: spec_of(path, w, sizes))


def place(params: Params, config: ModelConfig) -> Params:
    """Parameters as fp32 arrays that lie as `param_specs` says; each process puts what its devices hold."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(lambda w: jax.numpy.array(w, "float32"), params)  # copies: a step donates its state

    def put(w: Any, spec: PartitionSpec) -> jax.Array:
        w = np.asarray(w, np.float32)
        return jax.make_array_from_callback(w.shape, NamedSharding(mesh, spec), lambda index: w[index])

    return jax.tree.map(put, params, param_specs(config))


def gathered(part: Params, config: ModelConfig, under: str) -> Params:
    """Weights on their way into a product, whole along `fsdp`: `part` is the subtree `under` a path, of one layer where
    that is `layers`."""
    table, layer, sizes = weight_table(config), under == "layers", jax.sharding.get_abstract_mesh().shape

    def whole(name: str, w: jax.Array) -> jax.Array:
        path = f"{under}.{name}"
        return gather(w, tuple(spec_of(path, table[path], sizes))[layer:])

    return unflatten({path: whole(path, w) for path, w in flatten(part).items()})


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather(w: jax.Array, cut: tuple) -> jax.Array:
    """`w`, which lies as `cut`, whole along `fsdp`. Its gradient is summed into shares again (reduce-scatter): left to
    the transpose of a constraint, every device would get the whole sum, with twice the traffic."""
    return pin(w, *map(without_fsdp, cut))


gather.defvjp(lambda w, cut: (gather(w, cut), None), lambda cut, _, g: (pin(g, *cut),))


def without_fsdp(axes: Any) -> Any:
    """The axes of the mesh that still cut an axis of a gathered weight."""
    return tuple(name for name in as_tuple(axes) if name != "fsdp") or None if axes else None
