# shellcheck shell=bash
# Compiler flags per accelerator generation, as a table. Sourced by the launch scripts:
#
#     flags_for v5p                     prints the flags of a generation
#     flag_environment v5p              sets `environment` to what `env` takes: LIBTPU_INIT_ARGS=... or XLA_FLAGS=...
#
# TPU flags go into LIBTPU_INIT_ARGS: libtpu has a compiler of its own, which does not read XLA_FLAGS and ends the
# process at a name that it does not know. A flag stands here when a public source has it for training transformers;
# what it gives this library has not been measured. What the caller has set already is kept, behind ours.
#
# Sources: [jax] jax-ml/jax, docs/xla_flags.md, table of TPU flags; [maxtext] AI-Hypercomputer/maxtext,
# benchmarks/xla_flags_library.py; [trillium] gclouduniverse/reproducibility, Training/TPU-Trillium; [nvidia] NVIDIA
# JAX-Toolbox, "Environment Variables" and "Tips for High-Performance LLMs with JAX and XLA".

# Collectives run piecewise inside the products scheduled around them, on the tensor core: with parameters sharded, the
# all-gather of the next layer hides behind this one. [jax; maxtext: CF_FOR_ALL_GATHER; trillium]
fused_collectives=(
    --xla_enable_async_all_gather=true                             # an all-gather may start early and end late
    --xla_tpu_enable_async_collective_fusion=true                    # the pass that fuses compute in between
    --xla_tpu_enable_async_collective_fusion_multiple_steps=true     # one collective across several fusions
    --xla_tpu_overlap_compute_collective_tc=true                     # also on chips with a single tensor core
)
# The same for all-gathers: on v5e alone, since libtpu 0.0.50 ends a program elsewhere ("incorrect results, hang").
fused_all_gathers=(--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true)

# v5p and tpu7x have sparse cores that run collectives by themselves while the tensor core multiplies; fusing those into
# the tensor core's work would take them away again, so that is off. [maxtext: ENABLE_SPAR(S)ECORE_OFFLOADING_*]
sparse_core_collectives=(
    --xla_tpu_enable_sparse_core_collective_offload_all_gather=true
    --xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true
    --xla_tpu_enable_sparse_core_collective_offload_all_reduce=true
    --xla_tpu_enable_async_collective_fusion_fuse_all_gather=false
    --xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false
    --xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false
    --xla_tpu_use_tc_device_shape_on_sc=true       # this and what follows: how the work is laid out there
    --xla_sc_disable_megacore_partitioning=true
    --xla_sc_enable_instruction_fusion=false
    --xla_sc_disjoint_spmem=false
)

# Between slices, over the data center's network: gradients of one layer travel while the next is computed. With one
# slice there is nothing for it to do. [jax; maxtext: DATA_PARALLEL_OVERLAP]
between_slices=(
    --xla_tpu_enable_data_parallel_all_reduce_opt=true
    --xla_tpu_data_parallel_opt_different_sized_ops=true
)

# 96 of the 128 MiB of VMEM for a fusion's own tiles, which makes them larger. Kernels ask for their VMEM themselves.
# [trillium; maxtext: DENSE_VMEM_LIMIT]
large_tiles=(--xla_tpu_scoped_vmem_limit_kib=98304)

# Communication is moved away from where it would be waited for. [nvidia: set in their JAX images]
gpu_overlap=(--xla_gpu_enable_latency_hiding_scheduler=true)

flags_for() {
    case $1 in
        v4) echo "${fused_collectives[*]} ${between_slices[*]}" ;;
        v5e) echo "${fused_collectives[*]} ${fused_all_gathers[*]} ${between_slices[*]}" ;;
        v5p | tpu7x) echo "${sparse_core_collectives[*]} ${between_slices[*]}" ;;
        v6e) echo "${fused_collectives[*]} ${between_slices[*]} ${large_tiles[*]}" ;;
        gpu) echo "${gpu_overlap[*]}" ;;
        *) echo "flags.sh: no flags for '$1'; the table has v4, v5e, v5p, v6e, tpu7x and gpu" >&2; return 2 ;;
    esac
}

# shellcheck disable=SC2034 # `environment` is for the caller
flag_environment() {
    local flags
    flags=$(flags_for "$1") || return
    if [ "$1" = gpu ]; then
        environment=("XLA_FLAGS=$flags${XLA_FLAGS:+ $XLA_FLAGS}"
            # XLA takes this share of the GPU's memory at the start, instead of three quarters. [nvidia]
            "XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.9}")
    else
        environment=("LIBTPU_INIT_ARGS=$flags${LIBTPU_INIT_ARGS:+ $LIBTPU_INIT_ARGS}")
    fi
}
