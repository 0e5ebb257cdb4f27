"""Compiling for TPUs where there are none: the TPU compiler runs on any Linux machine that has `libtpu`."""

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from dlm_jax.errors import UserError

# What libtpu would ask the machine for, were there TPUs; two processes may load it at once.
SETTINGS = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "TPU_ACCELERATOR_TYPE": "v5e-4"}


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a TPU topology such as `v5e:2x2` or `tpu7x:2x2x1`, times `slices`, to compile for.

    Raises `UserError` for an unknown topology, or without `libtpu`.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install 'dlm-jax[tpu]'")
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        settings: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
        if topology.startswith("v4:"):
            settings["chip_config_name"] = "megacore"  # the two cores of a chip are one device, as JAX has them
        return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the TPU compiler does not know the topology '{topology}': {reason}") from None


def compile_for_chip(topology: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct) -> Any:
    """`function` compiled for one chip of a topology, from the shapes of its arguments."""
    mesh = jax.sharding.Mesh(devices(topology)[:1], ("chip",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    placed = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place) for x in shapes]
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask it what chip they are traced for
        return jax.jit(function).trace(*placed).lower(lowering_platforms=("tpu",)).compile()
