"""The mesh of devices: `replica` x `fsdp` x `tensor`, and how a computation is spread over it.

Arrays of the state carry their layout in their type (explicit axes), so the optimizer's state lies like its parameters.
The model itself is computed with the axes left to the compiler (`spread`), pinned where it matters: so its equations
say nothing of devices. Without a mesh (one device) all of this is nothing.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlm_jax.errors import UserError

AXES = ("replica", "fsdp", "tensor")
BATCH = ("replica", "fsdp")  # the batch is cut over both; parameters only over the second


def make_mesh(replica: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of all devices, or None where there is one. One of the sizes may be -1: what is left.

    Across slices of a TPU, or hosts of GPUs, `replica` is outermost. Raises `UserError` for sizes that do not make up
    the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(replica, fsdp, tensor, len(devices))
    if len(devices) == 1:
        return None
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise UserError(f"mesh.replica {sizes[0]} must be a multiple of the {slices} slices: only it goes across them")
    if slices > 1:
        from jax.experimental.mesh_utils import create_hybrid_device_mesh
        grid = create_hybrid_device_mesh([sizes[0] // slices, *sizes[1:]], [slices, 1, 1], devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 3)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def mesh_sizes(replica: int, fsdp: int, tensor: int, count: int) -> list[int]:
    """The sizes on `count` devices, -1 replaced. Raises `UserError` where they do not make up that number."""
    sizes = [replica, fsdp, tensor]
    known = math.prod(size for size in sizes if size > 0)
    whole = sizes.count(-1) <= 1 and min(size for size in [*sizes, 1] if size != -1) > 0
    if not whole or count % known or (-1 not in sizes and known != count):
        raise UserError(f"mesh.replica {replica} x mesh.fsdp {fsdp} x mesh.tensor {tensor} does not make up the "
                        f"{count} devices; let one of them be -1, which takes what is left")
    return [count // known if size == -1 else size for size in sizes]


def shares(*axes: str) -> int:
    """Into how many shares these axes cut, in the mesh of the program that is traced; 1 without a mesh."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def spread(function: Callable, out: Any) -> Callable:
    """`function` with the layout of what is in it left to the compiler; its results lie as `out` says (a tree of
    `PartitionSpec`, or one for all). Without a mesh it is the function itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return function
    return jax.sharding.auto_axes(function, out_sharding=out)


def pin(x: jax.Array, *spec: Any) -> jax.Array:
    """`x`, lying as the spec says: inside `spread`, where the mesh divides it so; elsewhere `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Auto not in mesh.axis_types:
        return x
    fits = [axes is not None and size % shares(*as_tuple(axes)) == 0 for axes, size in zip(spec, x.shape)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes if fit else None for axes, fit in zip(spec, fits))))


def own_share(batch: int) -> tuple[int, int]:
    """(i, n): of n equal runs of the rows of a batch, number i is what this process's devices need."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return 0, 1
    layout = NamedSharding(mesh, PartitionSpec(BATCH)).addressable_devices_indices_map((batch,))
    ends = [index[0].indices(batch) for index in layout.values() if index is not None]
    first, end = min(end[0] for end in ends), max(end[1] for end in ends)
    size = end - first
    return (first // size, batch // size) if batch % size == 0 and first % size == 0 else (0, 1)


def whole_batch(rows: np.ndarray, batch: int) -> Any:
    """The batch of all processes, [batch, ...], of which `rows` are this process's own share."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return rows
    start = own_share(batch)[0] * len(rows)

    def part(index: Any) -> np.ndarray:
        first, end, _ = index[0].indices(batch)
        return rows[first - start:end - start]

    return jax.make_array_from_callback((batch, *rows.shape[1:]), NamedSharding(mesh, PartitionSpec(BATCH)), part)


def as_tuple(axes: Any) -> tuple[str, ...]:
    """One axis of a mesh, or several, as a tuple."""
    return (axes,) if isinstance(axes, str) else tuple(axes)
