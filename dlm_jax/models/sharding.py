"""How each weight is sharded over the mesh, from the logical axes in the one weight table."""

import contextlib
import functools
import math
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params, Weight, flatten, unflatten, weight_table
from dlm_jax.parallel.mesh import WIDTH_AXES, MeshAxes, as_tuple, constrain
from dlm_jax.typing import Array

# The mesh axis that each logical axis of a matrix is split over. Heads and mlp are both split over `tensor`, so that a
# layer needs one all-reduce over it after each of its two halves; the width is split over the others and gathered just
# before use.
LOGICAL_TO_MESH: dict[str, MeshAxes] = {"vocab": "tensor", "embed": WIDTH_AXES, "heads": "tensor", "kv_heads": "tensor",
                                        "mlp": "tensor"}
# An untied head is split along the vocabulary over all of them, where that divides it: split along the width, its full
# gradient would have to be moved.
HEAD_LOGICAL_TO_MESH: dict[str, MeshAxes] = {"vocab": (*WIDTH_AXES, "tensor")}


def partition_spec(path: str, weight: Weight, sizes: Mapping[str, int]) -> PartitionSpec:
    """The layout of a weight in a mesh of these sizes (by axis name). Weights other than matrices, and axes that the
    mesh does not divide, are replicated."""
    if not weight.decays:
        return PartitionSpec()
    if path == "head.weight":
        by_vocabulary = logical_to_physical(weight, HEAD_LOGICAL_TO_MESH, sizes)
        if any(by_vocabulary):
            return by_vocabulary
    return logical_to_physical(weight, LOGICAL_TO_MESH, sizes)


def logical_to_physical(weight: Weight, rules: Mapping[str, MeshAxes], sizes: Mapping[str, int]) -> PartitionSpec:
    """The layout of a weight by these rules; None for an axis that has no rule or that the mesh does not divide."""
    spec = []
    for axis, size in zip(weight.axes, weight.shape):
        mesh_axes = rules.get(axis)
        divides = size % math.prod(sizes.get(name, 1) for name in as_tuple(mesh_axes)) == 0
        spec.append(mesh_axes if divides else None)
    return PartitionSpec(*spec)


def param_specs(table: Mapping[str, Weight]) -> Params:
    """The layout of the weights of a table in the current mesh: a tree of `PartitionSpec`."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return unflatten({path: partition_spec(path, w, sizes) for path, w in table.items()})


def shard_params(params: Params, table: Mapping[str, Weight]) -> Params:
    """The parameters as fp32 arrays laid out as in `param_specs`; each process places what its own devices hold."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jax.tree.map(lambda w: jax.numpy.array(w, "float32"), params)  # copies: a step donates its state

    def put(w: Array, spec: PartitionSpec) -> jax.Array:
        w = np.asarray(w, np.float32)
        return jax.make_array_from_callback(w.shape, NamedSharding(mesh, spec), lambda index: w[index])

    return jax.tree.map(put, params, param_specs({path: table[path] for path in flatten(params)}))


def place_params(params: Params, config: ModelConfig, mesh: Mesh) -> Params:
    """The parameters laid out in a mesh, each device holding its own part only. Raises `UserError` where `tensor` does
    not divide the key-value heads."""
    check_tensor(config, mesh.shape["tensor"])
    table = weight_table(config)
    return unflatten({path: jax.device_put(w, NamedSharding(mesh, partition_spec(path, table[path], mesh.shape)))
                      for path, w in flatten(params).items()})


def check_tensor(config: ModelConfig, tensor: int) -> None:
    """Raises `UserError` where `tensor` devices cannot share the heads of a model evenly."""
    if config.kv_heads % tensor:
        raise UserError(f"tensor {tensor} does not divide the {config.kv_heads} key-value heads; choose one that does")


def mesh_of(params: Params) -> Mesh | None:
    """The mesh in which `place_params` has laid them out, or None."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and "tensor" in mesh.shape else None


def in_mesh_of(params: Params) -> contextlib.AbstractContextManager:
    """Sets the mesh in which `place_params` has laid them out, if it has."""
    mesh = mesh_of(params)
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def merge_heads(subtree: Params, config: ModelConfig, prefix: str) -> Params:
    """Weights with heads and head_dim as one axis, as `linear` multiplies them; `subtree` is what lies under the path
    `prefix`. On TPUs an array with two axes for them has tiles of another shape, so each gathered weight of a layer
    would be copied: before the layers are taken apart, this costs a device the copy of its own shard."""
    table = weight_table(config)

    def merge(name: str, w: Array) -> Array:
        axes = table[f"{prefix}.{name}"].axes
        heads = next((i for i, axis in enumerate(axes) if axis in ("heads", "kv_heads")), None)
        return w if heads is None else w.reshape(*w.shape[:heads], -1, *w.shape[heads + 2:])

    return unflatten({name: merge(name, w) for name, w in flatten(subtree).items()})


def gather_weights(subtree: Params, config: ModelConfig, prefix: str) -> Params:
    """Weights gathered along `WIDTH_AXES` for use in a product. `subtree` is what lies under the path `prefix`; under
    `layers` it is one layer, its layer axis already taken off and its heads merged."""
    table, sizes = weight_table(config), jax.sharding.get_abstract_mesh().shape
    first = 1 if prefix == "layers" else 0

    def gather(name: str, w: jax.Array) -> jax.Array:
        path = f"{prefix}.{name}"
        spec = partition_spec(path, table[path], sizes)
        kept = [axes for axis, axes in zip(table[path].axes, spec) if axis != "head_dim"]
        return gather_width(w, tuple(kept[first:]))

    return unflatten({name: gather(name, w) for name, w in flatten(subtree).items()})


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def gather_width(w: jax.Array, spec: tuple[MeshAxes, ...]) -> jax.Array:
    """`w`, laid out by `spec`, gathered along `WIDTH_AXES`. Its gradient is reduce-scattered: the transpose of a
    constraint would all-reduce it instead, with twice the traffic."""
    return constrain(w, *map(drop_width, spec))


gather_width.defvjp(lambda w, spec: (gather_width(w, spec), None), lambda spec, _, g: (constrain(g, *spec),))


def drop_width(axes: MeshAxes) -> MeshAxes:
    """The mesh axes that an axis of a gathered weight is still split over."""
    return tuple(name for name in as_tuple(axes) if name not in WIDTH_AXES) or None
