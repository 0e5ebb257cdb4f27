"""Compiler options of the training step for each kind of accelerator.

They are options of the program and not of the process, so they hold whoever starts it: a launch script, a notebook, or
`dlm aot` without any device. An option is listed when `dlm aot` shows what it changes, or when a public source
recommends it for training transformers. None has been timed on a TPU.

Sources: [jax] jax-ml/jax, docs/xla_flags.md; [maxtext] AI-Hypercomputer/maxtext, benchmarks/xla_flags_library.py;
[trillium] gclouduniverse/reproducibility, Training/TPU-Trillium; [nvidia] NVIDIA JAX-Toolbox, "Environment Variables".
"""

import os

from dlm_jax.parallel.device_specs import traced_device_kind

Options = dict[str, bool | int]

# Collectives are split into pieces and fused with the matrix products around them, on the tensor core: with sharded
# parameters, the all-gather of the next layer overlaps with this one. [jax; maxtext: CF_FOR_ALL_GATHER; trillium]
FUSED_COLLECTIVES: Options = {
    "xla_enable_async_all_gather": True,  # an all-gather may start early and finish late
    "xla_tpu_enable_async_collective_fusion": True,  # the compiler pass that does the fusing
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,  # one collective across several fusions
    "xla_tpu_overlap_compute_collective_tc": True,  # on chips with a single tensor core too
}
# The same for all-gathers, on v5e only: elsewhere libtpu 0.0.50 aborts the program ("incorrect results, hang").
FUSED_ALL_GATHERS: Options = {"xla_tpu_enable_async_collective_fusion_fuse_all_gather": True}

# Sparse cores run collectives on their own while the tensor core multiplies. Fusing the collectives into the tensor
# core's work would undo that, so fusion is off. [maxtext: ENABLE_SPARSECORE_OFFLOADING_*]
SPARSE_CORE: Options = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_reduce_scatter": True,
    "xla_tpu_enable_sparse_core_collective_offload_all_reduce": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,  # layout of the work there
}
TWO_TENSOR_CORES: Options = {  # the same where a chip has two of them
    "xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter": False,
    "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": False,
    "xla_sc_disable_megacore_partitioning": True,
    "xla_sc_enable_instruction_fusion": False,
}

# All gathers start before their weights are needed, on the sparse cores, instead of standing in line. Those over a part
# of a slice with three axes may have two. LLaMA-2 7B on v5p-128, 2 records of 2,048 tokens per chip, full remat (jax
# 0.10.2, 2026-11-30): the traffic behind work 0 -> 99.8 %, the step 0.776 -> 0.714 s; with a copy on every 64 of 256
# chips the two axes bring 26 -> 99 %.
EARLY_2D_GATHERS: Options = {
    "xla_enable_async_all_gather": True,
    "xla_tpu_prefer_async_allgather_to_allreduce": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
}
EARLY_GATHERS = EARLY_2D_GATHERS | {"xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True}

# Products whose result is reduce-scattered stay whole, instead of a loop over pieces that pass around a ring.
# [maxtext: DISABLE_COLLECTIVE_MATMUL] The same model on v6e-32 with `save_qkv`: 16.4 -> 11.8 s for 32 micro-batches.
WHOLE_PRODUCTS: Options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1000000}

# Between slices, over the data center network: gradients of one layer are sent while the next is computed. No effect
# with a single slice. [jax; maxtext: DATA_PARALLEL_OVERLAP]
BETWEEN_SLICES: Options = {
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
}

# 96 of the 128 MiB of VMEM for the tiles of fusions, which makes them larger. Kernels request their own VMEM.
# [trillium; maxtext: DENSE_VMEM_LIMIT]
LARGE_TILES: Options = {"xla_tpu_scoped_vmem_limit_kib": 98304}

# Schedules communication early enough that nothing waits for it. [nvidia: set in their JAX images; jax 0.10 does so
# anyway] A large gradient leaves as soon as it is there: by itself the compiler joins those of a layer, up to 32 MiB
# each, and they leave together at its end. Traffic behind work, by `dlm aot` for 8 H200 (2026-11-30): LLaMA-2 7B
# 81 -> 92 %, Qwen3-8B 85 -> 93 %, Qwen2.5-1.5B 69 -> 89 %, GPT-2 M 97 % either way. Pipelined collectives and doubled
# loops hide 99 %, and copy what they gain.
GPU: Options = {"xla_gpu_enable_latency_hiding_scheduler": True,
                "xla_gpu_reduce_scatter_combine_threshold_bytes": 4 * 2**20}

# By device kind. `EARLY_GATHERS` and `WHOLE_PRODUCTS` change nothing on v4 and tpu7x (LLaMA-2 7B on 64 chips, 2 records
# each, 2026-11-30: 66 and 94 % of the traffic behind work), and `FUSED_ALL_GATHERS` hides less on v4 (55 %).
TPU: dict[str, Options] = {
    "TPU v4": FUSED_COLLECTIVES | BETWEEN_SLICES,
    "TPU v5 lite": FUSED_COLLECTIVES | FUSED_ALL_GATHERS | WHOLE_PRODUCTS | BETWEEN_SLICES,
    "TPU v5": SPARSE_CORE | TWO_TENSOR_CORES | EARLY_GATHERS | BETWEEN_SLICES,
    "TPU v6 lite": SPARSE_CORE | EARLY_2D_GATHERS | WHOLE_PRODUCTS | BETWEEN_SLICES | LARGE_TILES,
    "TPU7x": SPARSE_CORE | TWO_TENSOR_CORES | BETWEEN_SLICES,
}


def compiler_options() -> Options:
    """The options for the device that programs are traced for; without those that the environment sets, in
    `LIBTPU_INIT_ARGS` for a TPU and in `XLA_FLAGS` for a GPU."""
    kind = traced_device_kind()
    if kind == "cpu":
        return {}
    options, variable = (TPU.get(kind, {}), "LIBTPU_INIT_ARGS") if kind.startswith("TPU") else (GPU, "XLA_FLAGS")
    chosen = {flag.lstrip("-").partition("=")[0] for flag in os.environ.get(variable, "").split()}
    return {name: value for name, value in options.items() if name not in chosen}
