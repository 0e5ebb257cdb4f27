"""Compiling for TPUs and GPUs you do not have: their compilers run on any Linux machine."""

import importlib.util
import os
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from dlm_jax.aot.slices import GENERATIONS, parse_slice
from dlm_jax.errors import UserError
from dlm_jax.parallel.device_specs import DEVICE_SPECS

# What libtpu would otherwise ask the machine's metadata server for; several processes may load it at once.
TPU_SETTINGS = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
                "TPU_ACCELERATOR_TYPE": "v5e-4"}
MAX_SLICES = 1024
HOST_GPUS = 8
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
# What the compiler would ask the GPU for: a Hopper (sm_90a) with 132 multiprocessors. H100 and H200 differ only in name
# and memory.
HOPPER = """
platform_name: "CUDA"
device_description_str: "{name}"
dnn_version_info {{ major: 9 minor: 10 }}
gpu_device_info {{
  cuda_compute_capability {{ major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }}
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 threads_per_warp: 32
  threads_per_block_limit: 1024 threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  l2_cache_size: 52428800 device_memory_size: {memory:.0f} memory_bandwidth: {bandwidth:.0f}
}}
"""


def devices(topology: str, slices: int = 1) -> list[Any]:
    """The devices to compile for: `slices` slices of TPUs, by name (`v5p-128`) or shape (`v5p:4x4x4`), or Hopper GPUs
    in hosts of eight, `h100:8` or `h200:16`; across hosts as across slices, only `mesh.replica` is split.

    Raises `UserError` for an unknown topology, or where its compiler is not installed.
    """
    if not 1 <= slices <= MAX_SLICES:
        raise UserError(f"{slices} slices are not between 1 and {MAX_SLICES}; the compiler would end with a crash")
    kind = topology.partition(":")[0]
    return gpu_devices(topology, slices) if kind in GPUS else tpu_devices(topology, slices)


def tpu_devices(topology: str, slices: int) -> list[Any]:
    """`devices` of a TPU topology."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for a TPU needs libtpu: pip install 'dlm-jax[tpu]'")
    for name, value in TPU_SETTINGS.items():
        os.environ.setdefault(name, value)
    rented = parse_slice(topology)
    if rented is None:
        raise UserError(f"'{topology}' is no slice of TPUs; name one such as v5p-128, v5p:4x4x4 or v6e:4x8, of "
                        f"{', '.join(GENERATIONS)}")
    settings: dict[str, Any] = rented.options | ({"num_slices": slices} if slices > 1 else {})
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=rented.topology, **settings).devices)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"the TPU compiler does not know the topology '{topology}': {reason}") from None


def gpu_devices(topology: str, slices: int) -> list[Any]:
    """`devices` of GPUs: up to eight of one host, or several hosts of eight."""
    kind, _, count = topology.partition(":")
    hosts, rest = divmod(int(count), HOST_GPUS) if re.fullmatch(r"[1-9]\d{0,4}", count) else (0, 0)
    if slices > 1 or not (rest if hosts == 0 else rest == 0):
        sliced = f" in {slices} slices" if slices > 1 else ""
        raise UserError(f"'{topology}'{sliced} is not a topology of GPUs; give up to {HOST_GPUS} of one host, such as "
                        f"{kind}:8, or several hosts of {HOST_GPUS}, such as {kind}:16")
    if importlib.util.find_spec("jax_plugins") is None:
        raise UserError("compiling for a GPU needs the CUDA build of jax: pip install 'dlm-jax[gpu]'")
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # jax would ask the driver for its version
    peak = DEVICE_SPECS[GPUS[kind]]
    target = HOPPER.format(name=GPUS[kind], memory=peak.memory, bandwidth=peak.bandwidth)
    shape = f"{hosts or 1}x1x{rest or HOST_GPUS}"
    return list(topologies.get_topology_desc("", "cuda", target_config=target, topology=shape).devices)


def platform_of(device: Any) -> str:
    """The platform that a program for a device is lowered for."""
    return "cuda" if device.platform == "gpu" else "tpu"


def compile_for_chip(topology: str, function: Callable[..., Any], *shapes: Any) -> Any:
    """`function` compiled for one chip of a topology; `shapes` are trees of `jax.ShapeDtypeStruct`."""
    mesh = jax.sharding.Mesh(devices(topology)[:1], ("chip",))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), shapes)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # kernels ask the mesh what chip they are traced for
        return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform_of(mesh.devices[0]),)).compile()
