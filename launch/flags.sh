# shellcheck shell=bash
# Compiler flags for each accelerator generation. Sourced by the launch scripts:
#
#     flags_for v5p                     prints the flags of that generation
#     flag_environment v5p              sets `environment` to arguments for `env`: LIBTPU_INIT_ARGS=... or XLA_FLAGS=...
#
# TPU flags go into LIBTPU_INIT_ARGS: libtpu has its own compiler, which does not read XLA_FLAGS and aborts the process
# on an unknown flag. A flag is listed when a public source recommends it for training transformers, or when `dlm aot`
# shows its effect: LIBTPU_INIT_ARGS="$(flags_for v5p)" dlm aot ... plans with it. None has been timed on a TPU. Flags
# already set by the caller are kept and come after ours.
#
# Sources: [jax] jax-ml/jax, docs/xla_flags.md, table of TPU flags; [maxtext] AI-Hypercomputer/maxtext,
# benchmarks/xla_flags_library.py; [trillium] gclouduniverse/reproducibility, Training/TPU-Trillium; [nvidia] NVIDIA
# JAX-Toolbox, "Environment Variables" and "Tips for High-Performance LLMs with JAX and XLA".

# Collectives are split into pieces and fused with the matrix products around them, on the tensor core: with sharded
# parameters, the all-gather of the next layer overlaps with this one. [jax; maxtext: CF_FOR_ALL_GATHER; trillium]
fused_collectives=(
    --xla_enable_async_all_gather=true                             # an all-gather may start early and finish late
    --xla_tpu_enable_async_collective_fusion=true                    # the compiler pass that does the fusing
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true     # one collective across several fusions
    --xla_tpu_overlap_compute_collective_tc=true                     # on chips with a single tensor core too
)
# The same for all-gathers, on v5e only: elsewhere libtpu 0.0.50 aborts the program ("incorrect results, hang").
fused_all_gathers=(--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true)

# v5p and tpu7x have sparse cores, which run collectives on their own while the tensor core multiplies. Fusing the
# collectives into the tensor core's work would undo that, so fusion is off. [maxtext: ENABLE_SPAR(S)ECORE_OFFLOADING_*]
sparse_core_collectives=(
    --xla_tpu_enable_sparse_core_collective_offload_all_gather=true
    --xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true
    --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=false
    --xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false
    --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false
    --xla_tpu_use_tc_device_shape_on_sc=true       # this and the next three: layout of the work there
    --xla_sc_disable_megacore_partitioning=true
    --xla_sc_enable_instruction_fusion=false
    --xla_sc_disjoint_spmem=false
)

# All gathers start before their weights are needed, on the sparse cores, instead of standing in line. `dlm aot`, LLaMA-2
# 7B on v5p-128, 2 records of 2,048 tokens per chip, full remat (jax 0.10.2, 2026-11-30): the share of collectives that
# travels behind work 33 % -> 99 %, the step 0.809 -> 0.713 s, MFU 47 -> 54 %, memory 6.0 -> 6.3 GiB.
early_gathers=(
    --xla_enable_async_all_gather=true
    --xla_tpu_prefer_async_allgather_to_allreduce=true
    --xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true
)

# Between slices, over the data center network: gradients of one layer are sent while the next is computed. No effect
# with a single slice. [jax; maxtext: DATA_PARALLEL_OVERLAP]
between_slices=(
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
)

# 96 of the 128 MiB of VMEM for the tiles of fusions, which makes them larger. Kernels request their own VMEM.
# [trillium; maxtext: DENSE_VMEM_LIMIT]
large_tiles=(--xla_tpu_scoped_vmem_limit_kib=98304)

# Schedules communication early enough that nothing waits for it. [nvidia: set in their JAX images]
gpu_overlap=(--xla_gpu_enable_latency_hiding_scheduler=true)

flags_for() {
    case $1 in
        v4) echo "${fused_collectives[*]} ${between_slices[*]}" ;;
        v5e) echo "${fused_collectives[*]} ${fused_all_gathers[*]} ${between_slices[*]}" ;;
        v5p) echo "${sparse_core_collectives[*]} ${early_gathers[*]} ${between_slices[*]}" ;;
        tpu7x) echo "${sparse_core_collectives[*]} ${between_slices[*]}" ;;
        v6e) echo "${fused_collectives[*]} ${between_slices[*]} ${large_tiles[*]}" ;;
        gpu) echo "${gpu_overlap[*]}" ;;
        *) echo "flags.sh: no flags for '$1'; choose v4, v5e, v5p, v6e, tpu7x or gpu" >&2; return 2 ;;
    esac
}

# shellcheck disable=SC2034 # `environment` is read by the caller
flag_environment() {
    local flags
    flags=$(flags_for "$1") || return
    if [ "$1" = gpu ]; then
        environment=("XLA_FLAGS=$flags${XLA_FLAGS:+ $XLA_FLAGS}"
            # XLA preallocates this fraction of GPU memory instead of three quarters. [nvidia]
            "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}")
    else
        environment=("LIBTPU_INIT_ARGS=$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}")
    fi
}
