"""The whole training step on a pod beside MaxText's, by the schedule of one TPU compiler.

    python benchmarks/pod_step.py [--results runs/pod_step] [--only v5p-128]

Runs in an environment with MaxText (`make pod-step` makes it). Both train on as many tokens per chip in one
micro-batch, each with the remat policy that is fastest among those that fit: ours is DiffuLLaMA's step, or
Efficient-DLM's with two streams, MaxText's the autoregressive one, with the flags that it ships for that chip and model
or those for sparse cores, whichever are faster. The schedule knows no kernel: what MaxText's take is computed from
their tiles, as ours is (docs/performance.md). Each program is compiled in a process of its own, five to ten minutes;
its figures are kept in --results.
"""

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import jax
from pods import version

from dlm_jax.aot.estimate import CORES, time_spent
from dlm_jax.aot.program import read_program
from dlm_jax.aot.report import Memory, aot
from dlm_jax.aot.slices import parse_slice
from dlm_jax.config import load_config
from dlm_jax.files import write_text
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.shapes import SHAPES
from dlm_jax.parallel.device_specs import GIB, device_spec

LENGTH = 2048
KINDS = {"v5p": "TPU v5", "v6e": "TPU v6 lite", "v5e": "TPU v5 lite"}
# Cycles of a tile of 512 queries x 1,024 keys, head_dim 128, in jax's splash kernels with a stored mask, as MaxText
# calls them: forward; dq with dk and dv (the larger of the bundles and the bound of the matrix unit).
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
# And its DISABLE_COLLECTIVE_MATMUL, without which products pass around a ring in pieces on v5e and v6e.
MAXTEXT_WHOLE = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"


@dataclasses.dataclass(frozen=True)
class Case:
    """One slice and model, and what each side is compiled with there."""

    slice: str
    config: str  # our name for the model and its recipe
    model: str  # MaxText's name for it
    records: int  # of LENGTH tokens, per chip; of two streams each counts twice
    ours: tuple[str, ...]  # remat policies to try
    theirs: tuple[tuple[str, str], ...]  # remat policies, and keys of `their_flags`

    @property
    def generation(self) -> str:
        """`v5p` of `v5p-128`."""
        return self.slice.partition("-")[0]

    @property
    def chips(self) -> int:
        """Of the slice."""
        found = parse_slice(self.slice)
        assert found is not None
        return math.prod(found.shape)

    @property
    def streams(self) -> int:
        """How many streams our recipe has."""
        return load_config(self.config).recipe.streams


CASES = (
    Case("v5p-128", "diffullama_7b", "llama2-7b", 4, ("save_projections",),
         (("minimal", "shipped"), ("minimal", "sparse"))),
    Case("v6e-32", "diffullama_7b", "llama2-7b", 2, ("save_projections",),
         (("minimal", "shipped"), ("minimal", "sparse"), ("save_qkv_proj", "sparse"), ("minimal", "sparse whole"))),
    Case("v5e-32", "diffullama_7b", "llama2-7b", 2, ("save_qkv",),
         (("save_qkv_proj", "shipped"), ("save_qkv_proj", "shipped whole"))),
    Case("v5p-128", "efficient_dlm_8b", "qwen3-8b", 2, ("save_projections",), (("minimal", "sparse"),)),
)


def their_flags(generation: str, name: str) -> str:
    """MaxText's: `shipped` for the chip and model, those for `sparse` cores, and either with products `whole`."""
    first, _, whole = name.partition(" ")
    flags = MAXTEXT_FLAGS[generation] if first == "shipped" else MAXTEXT_SPARSE_CORE
    return f"{flags} {MAXTEXT_WHOLE}" if whole else flags


def our_step(case: Case, remat: str) -> dict[str, Any]:
    """The figures of our step."""
    report = aot(load_config(case.config, [
        f"train.global_batch_size={case.records * case.chips}", "train.grad_accum_steps=1", f"model.remat={remat}",
        f"data.seq_length={LENGTH}"]), case.slice)
    return {"peak_gib": report.peak_gib, "seconds": report.seconds_step, "spent": report.spent,
            "hidden": report.hidden_share, "mfu": report.mfu}


def their_step(case: Case, remat: str, flags: str) -> dict[str, Any]:
    """The figures of MaxText's step, with as many records as ours computes."""
    from maxtext.trainers.pre_train import train_compile
    os.environ["LIBTPU_INIT_ARGS"] = flags
    compiled: list[Any] = []

    def compile_and_keep(*arguments: Any, **named: Any) -> Any:
        compiled.append(jit_and_compile(*arguments, **named))
        return compiled[0]

    jit_and_compile, train_compile.jit_and_compile = train_compile.jit_and_compile, compile_and_keep
    records = case.records * case.streams
    try:
        train_compile.main([
            "", str(Path(train_compile.__file__).parents[2] / "configs" / "base.yml"), f"model_name={case.model}",
            f"compile_topology={case.slice}", "compile_topology_num_slices=1", f"per_device_batch_size={records}",
            f"max_target_length={LENGTH}", f"remat_policy={remat}", "attention=flash", "dataset_type=synthetic",
            "enable_checkpointing=false", "skip_jax_distributed_system=true"])
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {}
    program, memory = read_program(compiled[0].as_text()), Memory.of(compiled[0].memory_analysis())
    spec, model = device_spec(KINDS[case.generation]), SHAPES[load_config(case.config).model.base]
    assert spec is not None and spec.clock is not None
    clock = spec.clock
    spent, hidden = time_spent(program, spec, lambda name: splash_seconds(name, case, model, clock))
    return {"peak_gib": memory.peak / GIB, "seconds": sum(spent.values()), "spent": spent, "hidden": hidden}


def splash_seconds(name: str, case: Case, model: ModelConfig, clock: float) -> float:
    """Seconds of one run of a splash kernel over the causal blocks of a chip's records. Its two backward kernels share
    what `SPLASH_CYCLES` says of both."""
    blocks = LENGTH // SPLASH_BLOCK
    area = blocks * (blocks + 1) / 2 * SPLASH_BLOCK**2 / (512 * 1024)
    forward, backward = SPLASH_CYCLES[case.generation]
    cycles = forward if "fwd" in name else backward / 2
    tiles = area * case.records * case.streams * model.heads * model.head_dim / 128
    return tiles * cycles / CORES.get(KINDS[case.generation], 1) / clock


def kept(file: Path, arguments: list[str]) -> dict[str, Any]:
    """The figures of a program, from its file or else from a process that compiles it and writes the file; empty where
    it does not fit."""
    if not file.exists():
        print(" ".join(arguments), file=sys.stderr, flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, __file__, *arguments, "--write", str(file)], check=True)
    return json.loads(file.read_text())


def best(case: Case, number: int, side: str, results: Path) -> tuple[str, dict[str, Any]]:
    """The fastest of a side's settings that fits, and its figures."""
    found = {}
    settings = case.theirs if side == "theirs" else [(remat, "own") for remat in case.ours]
    spec = device_spec(KINDS[case.generation])
    assert spec is not None
    for remat, flags in settings:
        file = results / f"{case.slice}_{case.config}_{case.records}_{side}_{remat}_{flags.replace(' ', '_')}.json"
        figures = kept(file, ["--case", str(number), "--side", side, "--remat", remat, "--flags", flags])
        if figures and figures["peak_gib"] <= spec.memory / GIB:
            found[f"{remat}, {flags} flags"] = figures
    name = min(found, key=lambda name: found[name]["seconds"])
    return name, found[name]


def row(case: Case, side: str, settings: str, figures: dict[str, Any], ratio: float) -> str:
    """One row of the table."""
    spent = " | ".join(f"{figures['spent'][kind] * 1e3:.0f}"
                       for kind in ("products", "kernels", "copies", "other", "waiting"))
    return (f"| {case.slice} | {side}, {settings} | {case.records * case.streams} x {LENGTH} "
            f"| {figures['peak_gib']:.1f} | {spent} | {figures['hidden']:.0%} | {figures['seconds']:.3f} "
            f"| {ratio:.2f} |")


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("runs/pod_step"))
    parser.add_argument("--only", help="one slice")
    for hidden in ("--case", "--side", "--remat", "--flags", "--write"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.write:
        case = CASES[int(a.case)]
        figures = our_step(case, a.remat) if a.side == "ours" else their_step(
            case, a.remat, their_flags(case.generation, a.flags))
        write_text(Path(a.write), json.dumps(figures))
        return
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu", "maxtext"))
    print(f"{date.today()}, {versions}; milliseconds by the compiler's estimates\n")
    print("| slice | step | records of a chip | GiB | products | kernels | copies | other | waiting | hidden | seconds "
          "| of MaxText |\n|---|---|---|" + "---:|" * 9)
    for number, case in enumerate(CASES):
        if a.only in (None, case.slice):
            theirs, ours = (best(case, number, side, a.results) for side in ("theirs", "ours"))
            print(row(case, f"MaxText {case.model}", *theirs, 1.0))
            print(row(case, case.config, *ours, ours[1]["seconds"] / theirs[1]["seconds"]), flush=True)


if __name__ == "__main__":
    main()
