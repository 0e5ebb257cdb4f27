"""The mesh of devices, `replica` x `fsdp` x `context` x `tensor`, and how a computation is sharded over it.

Arrays of the training state carry their layout in their type (explicit axes), so optimizer moments are laid out like
their parameters. The model itself is computed with the axes left to the compiler (`auto_sharded`) and constrained where
it matters, so its equations do not mention devices.

On one device there is no mesh, and the functions here are no-ops.
"""

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlm_jax.errors import UserError
from dlm_jax.typing import Array

AXES = ("replica", "fsdp", "context", "tensor")
BATCH_AXES = ("replica", "fsdp")  # what the rows of a batch are split over; their tokens are over `context`
WIDTH_AXES = ("fsdp", "context")  # what the width of each weight is split over
MeshAxes = str | tuple[str, ...] | None  # what one axis of an array is split over; None for nothing

ArrayT = TypeVar("ArrayT", bound=Array)
Tree = TypeVar("Tree")
Result = TypeVar("Result")


def make_mesh(replica: int, fsdp: int, tensor: int, devices: Sequence[jax.Device] | None = None, *,
              context: int = 1) -> Mesh | None:
    """The mesh of all devices, or None where there is only one. One of the sizes may be -1, which takes what is left.

    Across slices of a TPU, or hosts of GPUs, `replica` is outermost. Raises `UserError` for sizes that do not multiply
    to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(replica, fsdp, tensor, len(devices), context)
    if len(devices) == 1:
        return None
    slices = count_slices(devices)
    check_slices(sizes[0], slices)
    if slices > 1:
        from jax.experimental.mesh_utils import create_hybrid_device_mesh
        grid = create_hybrid_device_mesh([sizes[0] // slices, *sizes[1:]], [slices, 1, 1, 1], devices)
        return Mesh(grid, AXES, axis_types=(AxisType.Explicit,) * 4)
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Explicit,) * 4, devices=devices)


def count_slices(devices: Sequence[jax.Device]) -> int:
    """How many slices of a TPU, or hosts of GPUs, the devices are on."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def check_slices(replica: int, slices: int) -> None:
    """Raises `UserError` if so many copies of the model do not divide over slices of a TPU, or hosts of GPUs."""
    if replica % slices:
        raise UserError(f"mesh.replica {replica} must be a multiple of the {slices} slices or hosts, as no other axis "
                        "crosses them")


def mesh_sizes(replica: int, fsdp: int, tensor: int, count: int, context: int = 1) -> list[int]:
    """The sizes on `count` devices, in the order of `AXES`, with -1 replaced. Raises `UserError` where they do not
    multiply to that number."""
    sizes = [replica, fsdp, context, tensor]
    known = math.prod(size for size in sizes if size > 0)
    valid = sizes.count(-1) <= 1 and all(size > 0 for size in sizes if size != -1)
    if not valid or count % known or (-1 not in sizes and known != count):
        raise UserError(f"mesh.replica {replica} x mesh.fsdp {fsdp} x mesh.context {context} x mesh.tensor {tensor} "
                        f"does not make up the {count} devices; let one of them be -1, which takes what is left")
    return [count // known if size == -1 else size for size in sizes]


def local_mesh(batch: int) -> Mesh | None:
    """The devices of this host that a batch is split over, or None for one device."""
    count = math.gcd(batch, jax.local_device_count())
    return Mesh(np.asarray(jax.local_devices()[:count]), ("batch",)) if count > 1 else None


def sampling_mesh(tensor: int, fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices of this host as groups of `fsdp` x `tensor` that hold the weights together, for sampling: `tensor`
    devices share each weight by heads and columns, `fsdp` by its width, and gather it for one layer after the other.
    A batch is split over all but `tensor`. Raises `UserError` where the groups do not come out even."""
    devices = jax.local_devices() if devices is None else devices
    if min(tensor, fsdp) < 1 or len(devices) % (fsdp * tensor):
        raise UserError(f"fsdp {fsdp} x tensor {tensor} does not divide the {len(devices)} devices; choose a divisor "
                        "of that")
    grid = np.asarray(devices).reshape(-1, fsdp, 1, tensor)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 4)


def outside_mesh(function: Callable[[Tree], Result], tree: Tree) -> Result:
    """`function(tree)` where no mesh is set, as sampling needs it; in a mesh with a copy of the tree on this host."""
    if jax.sharding.get_mesh().empty:
        return function(tree)
    with ThreadPoolExecutor(1) as other_thread:  # a mesh is set for its own thread only
        return other_thread.submit(function, jax.device_get(tree)).result()


def axis_size(*axes: str) -> int:
    """The number of shards that these mesh axes make together, in the mesh of the program being traced; else 1."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return math.prod(sizes.get(axis, 1) for axis in axes)


def auto_sharded(function: Callable, out: object) -> Callable:
    """`function` with the layout of its intermediates left to the compiler; its results are laid out by `out`, a tree
    of `PartitionSpec` or one for all. Without a mesh, the function itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Explicit not in mesh.axis_types:
        return function
    return jax.sharding.auto_axes(function, out_sharding=out)


def constrain(x: ArrayT, *spec: MeshAxes) -> ArrayT:
    """`x` constrained to the layout `spec`, one entry per axis, inside `auto_sharded`; an axis that the mesh does not
    divide stays unsplit. Elsewhere `x` itself."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or AxisType.Auto not in mesh.axis_types:
        return x
    fits = [size % axis_size(*as_tuple(axes)) == 0 for axes, size in zip(spec, x.shape)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(axes if fit else None for axes, fit in zip(spec, fits))))


def batch_axes(rows: int) -> MeshAxes:
    """The mesh axes that so many rows are split over: `BATCH_AXES`, or None where these do not divide them."""
    return BATCH_AXES if rows % axis_size(*BATCH_AXES) == 0 else None


def process_shard(batch: int) -> tuple[int, int]:
    """(i, n): of n equal runs of the `batch` rows, this process's devices need run i."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return 0, 1
    layout = NamedSharding(mesh, PartitionSpec(BATCH_AXES)).addressable_devices_indices_map((batch,))
    bounds = [index[0].indices(batch) for index in layout.values() if index is not None]
    first, end = min(bound[0] for bound in bounds), max(bound[1] for bound in bounds)
    size = end - first
    return (first // size, batch // size) if batch % size == 0 and first % size == 0 else (0, 1)


def global_batch(rows: np.ndarray, batch: int) -> Array:
    """The batch of all processes, [batch, ...], of which `rows` is this process's shard; else `rows` itself."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return rows
    start = process_shard(batch)[0] * len(rows)

    def local_rows(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None
        first, end, _ = index[0].indices(batch)
        return rows[first - start:end - start]

    sharding = NamedSharding(mesh, PartitionSpec(BATCH_AXES))
    return jax.make_array_from_callback((batch, *rows.shape[1:]), sharding, local_rows)


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
    """Mesh axes as a tuple."""
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
