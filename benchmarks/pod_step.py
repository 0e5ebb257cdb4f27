"""The whole training step on a pod beside MaxText's, by the schedule of one TPU compiler.

    python benchmarks/pod_step.py [--results runs/pod_step] [--only v5p-128]

Runs in an environment with MaxText (`make pod-step` makes it). Both train on as many tokens per chip in one micro-batch,
each with its own compiler options and the remat policy that is fastest among those that fit: ours is DiffuLLaMA's step,
or Efficient-DLM's with two streams, MaxText's the autoregressive one with the flags that it ships for that chip and
model. What its splash kernels take is not in the schedule either: it is taken from their tiles (docs/performance.md).
Each program is compiled in a process of its own, five to ten minutes; its figures are kept in --results.
"""

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

from dlm_jax.aot.estimate import CORES
from dlm_jax.aot.program import read_program
from dlm_jax.aot.schedule import schedule_of
from dlm_jax.aot.slices import parse_slice
from dlm_jax.parallel.device_specs import GIB, device_spec

LENGTH = 2048
KINDS = {"v5p": "TPU v5", "v6e": "TPU v6 lite", "v5e": "TPU v5 lite"}
# Cycles of a tile of 512 queries x 1,024 keys, head_dim 128, in jax's splash kernels with a stored mask, as MaxText calls
# them: forward; dq with dk and dv (the larger of the bundles and the bound of the matrix unit).
SPLASH_CYCLES = {"v5p": (2332, 7168), "v6e": (1741, 4467), "v5e": (2237, 7168)}
SPLASH_BLOCK = 512  # queries and keys of a block, its default

FUSED = ("--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true "
         "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true "
         "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true")
# MaxText 0.2.5, configs/tpu/{v5p,v5e}/llama2_7b.sh and v6e/llama2_7b_4096.sh, where libtpu still knows and runs them.
MAXTEXT_FLAGS = {
    "v5p": f"{FUSED} --xla_tpu_megacore_fusion_allow_ags=false --xla_enable_async_collective_permute=true "
           "--xla_tpu_enable_ag_backward_pipelining=true",
    "v6e": "--xla_tpu_scoped_vmem_limit_kib=98304 --xla_enable_async_all_gather=true "
           "--xla_tpu_overlap_compute_collective_tc=true --xla_tpu_enable_async_collective_fusion_multiple_steps=true "
           "--xla_tpu_enable_async_collective_fusion=true",
    "v5e": f"{FUSED} --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true"}
# The same repository's flags for sparse cores (benchmarks/xla_flags_library.py).
MAXTEXT_SPARSE_CORE = (
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_reduce=false "
    "--xla_tpu_enable_async_collective_fusion_fuse_reduce_scatter=false "
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true --xla_tpu_enable_all_gather_offload_tracing=true "
    "--xla_tpu_use_tc_device_shape_on_sc=true --xla_sc_disable_megacore_partitioning=true")


@dataclasses.dataclass(frozen=True)
class Case:
    """One slice and model, and what each side is compiled with there."""

    slice: str
    config: str  # of ours
    model: str  # MaxText's name for it
    records: int  # of LENGTH tokens, per chip; of two streams each counts twice
    ours: tuple[str, ...]  # remat policies to try
    theirs: tuple[str, ...]

    @property
    def generation(self) -> str:
        """`v5p` of `v5p-128`."""
        return self.slice.partition("-")[0]

    @property
    def chips(self) -> int:
        """Of the slice."""
        found = parse_slice(self.slice)
        assert found is not None
        return int(found.chips)


CASES = (
    Case("v5p-128", "diffullama_7b", "llama2-7b", 4, ("save_projections",), ("minimal", "save_qkv_proj")),
    Case("v6e-32", "diffullama_7b", "llama2-7b", 4, ("save_qkv", "full"), ("save_qkv_proj", "full")),
    Case("v5e-32", "diffullama_7b", "llama2-7b", 2, ("save_qkv", "full"), ("save_qkv_proj", "full")),
    Case("v5p-128", "efficient_dlm_8b", "qwen3-8b", 2, ("save_projections",), ("minimal", "save_qkv_proj")),
)


def kept(file: Path, arguments: list[str]) -> dict[str, Any]:
    """The figures of a program, from its file or else from a process that compiles it and writes the file. Empty where
    it does not fit."""
    if not file.exists():
        print(" ".join(arguments), file=sys.stderr, flush=True)
        subprocess.run([sys.executable, __file__, *arguments, "--write", str(file)], check=True)
    return json.loads(file.read_text())
