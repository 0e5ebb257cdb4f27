"""Every config on its target machines, compiled without a TPU or GPU: docs/pods.md.

    python benchmarks/pods.py [--out docs/pods.md] [--results runs/pods] [--only tiny tiny_stories]

Each row is one `dlm aot` in its own process, from a few seconds to ten minutes. Its JSON is kept in `--results`, so an
interrupted table resumes; delete that folder after a change to the training step.
"""

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

from dlm_jax.aot.topology import GPUS

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HEAD = 6_476_005_376, 131_076_096  # parameters in the matrices of the 7B LLaMA of the weak-scaling table
WEAK_SHARDS = 64  # chips that share one copy of that model

KEEP = "model.remat=save_projections"

Target = tuple[str, str, list[str]]  # config, topology, overrides
TARGETS: list[Target] = [
    ("tiny", "v5e:2x2", []),
    ("tiny_stories", "v5e:2x2", []),
    ("tiny_stories_blocks", "v5e:2x2", []),
    ("diffugpt_s", "v5e:2x4", []),
    ("diffugpt_m", "v5e:4x4", []),
    ("diffullama_7b", "v5e:4x8", []),
    ("diffullama_7b", "v5p:4x4x4", [KEEP, "train.grad_accum_steps=8"]),
    ("diffullama_7b", "v6e:4x8", [KEEP]),
    ("efficient_dlm_1p5b", "v5e:4x8", []),
    ("efficient_dlm_4b", "v5p:4x4x4", [KEEP]),
    ("efficient_dlm_8b", "v5p:4x4x8", [KEEP]),
    ("efficient_dlm_8b", "v6e:8x8", ["train.grad_accum_steps=8"]),
    ("efficient_dlm_8b_long", "v5p:4x4x4", []),
    ("efficient_dlm_8b_long", "v6e:8x8",
     ["model.remat=save_attention", "mesh.context=8", "train.grad_accum_steps=8"]),
    ("diffugpt_s", "h200:1", []),
    ("diffugpt_m", "h200:8", []),
    ("diffullama_7b", "h100:8", []),
    ("diffullama_7b", "h200:8", [KEEP]),
    ("efficient_dlm_1p5b", "h200:8", []),
    ("efficient_dlm_4b", "h200:8", ["train.grad_accum_steps=32"]),
    ("efficient_dlm_8b", "h200:8", ["train.grad_accum_steps=32"]),
    ("efficient_dlm_8b", "h200:16", ["train.grad_accum_steps=16", "mesh.replica=2"]),
]
# Two records per chip in one micro-batch; a copy of the model on every 64 chips.
WEAK: list[Target] = [
    ("diffullama_7b", topology, [KEEP, f"train.global_batch_size={2 * chips}", "train.grad_accum_steps=1",
                                 f"mesh.replica={chips // WEAK_SHARDS}"])
    for topology, chips in (("v5p:4x4x4", 64), ("v5p:4x8x8", 256), ("v5p:8x8x16", 1024))
]


def report(config: str, topology: str, overrides: list[str], results: Path) -> dict:
    """The report of `dlm aot --json`, from its file in `results` or else from a run that writes the file."""
    file = results / "_".join([config, topology.replace(":", "_"), *overrides]).replace("=", "-")
    if not file.exists():
        command = [sys.executable, "-m", "dlm_jax", "aot", "--json", "--config", config,
                   "--topology", topology, *(f"--config.{override}" for override in overrides)]
        print(" ".join(command[1:]), file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        results.mkdir(parents=True, exist_ok=True)
        file.write_text(done.stdout.splitlines()[-1])
    return json.loads(file.read_text())


def row(config: str, r: dict) -> str:
    """One row of the table of targets."""
    seconds, collectives = r["seconds"], sum(r["collective_gib"].values())
    return (f"| {config} | {r['topology']} ({r['chips']}) | {r['remat']} "
            f"| {r['global_batch_size']} / {r['grad_accum_steps']} "
            f"| {r['arguments_gib']:.2f} | {r['temporaries_gib']:.2f} | {r['peak_gib']:.2f} of {r['capacity_gib']:.0f} "
            f"| {'yes' if r['fits'] else 'NO'} | {collectives:.1f} "
            f"| {seconds['compute']:.3g} | {seconds['interconnect']:.2g} | {estimates(r)} |")


def estimates(r: dict) -> str:
    """What the schedule says, of GPUs as bounds: seconds of a step, MFU, copies and hidden traffic."""
    if r["seconds_step"] is None:  # it does not fit
        return " | ".join(["-"] * 4)
    least, most = ("≥ ", "≤ ") if r["topology"].partition(":")[0] in GPUS else ("", "")
    return (f"{least}{r['seconds_step']:.3g} | {most}{r['mfu']:.0%} | {r['copies_share']:.1%} "
            f"| {r['hidden_share']:.0%}")


def predicted(copies: int) -> float:
    """GiB that a chip receives per step of the 7B model in one micro-batch (docs/pods.md derives it)."""
    within_copy = 3 * 2 * LAYERS + (2 + 4) * HEAD
    across_copies = 4 * (LAYERS + 2 * HEAD) / WEAK_SHARDS if copies > 1 else 0
    return (within_copy + across_copies) / 2**30


def weak_row(r: dict) -> str:
    """One row of the table of weak scaling."""
    copies = r["chips"] // WEAK_SHARDS
    return (f"| {r['topology']} | {r['chips']} | {copies} | {r['peak_gib']:.2f} "
            f"| {sum(r['collective_gib'].values()):.1f} | {predicted(copies):.1f} | {r['seconds']['interconnect']:.2g} "
            f"| {r['seconds_step']:.4g} | {r['mfu']:.0%} |")


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Writes the page. Exits with an error where a config does not fit its target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pods.md")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "pods")
    parser.add_argument("--only", nargs="+", metavar="CONFIG", help="just the rows of these configs")
    a = parser.parse_args()
    chosen, chosen_weak = ([target for target in targets if not a.only or target[0] in a.only]
                           for targets in (TARGETS, WEAK))
    targets = [row(target[0], report(*target, a.results)) for target in chosen]
    weak = [weak_row(report(*target, a.results)) for target in chosen_weak]
    versions = ", ".join(f"{name} {version(name)}" for name in ("jax", "libtpu", "jax-cuda13-plugin"))
    text = (ROOT / "benchmarks" / "pods.md.in").read_text().format(
        versions=versions, date=datetime.date.today(), targets="\n".join(targets), weak="\n".join(weak))
    a.out.write_text(text)
    if any("NO" in line for line in targets):
        sys.exit("a config does not fit its target; the table shows which")


if __name__ == "__main__":
    main()
