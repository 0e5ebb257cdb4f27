"""Every config for the machines that it is meant for, compiled with no TPU or GPU: docs/pods.md.

    python benchmarks/pods.py [--out docs/pods.md] [--results runs/pods]

Each row is one `dlm aot` in a process of its own, from a few seconds to ten minutes; its JSON stays in `--results`, so
that a table that was interrupted goes on. Delete that folder after a change of the step.
"""

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAYERS, HEAD = 6_476_005_376, 131_076_096  # numbers in the matrices of the LLaMA that scales weakly

TARGETS = [
    ("tiny", "v5e:2x2", []),
    ("tiny_stories", "v5e:2x2", []),
    ("tiny_stories_blocks", "v5e:2x2", []),
    ("diffugpt_s", "v5e:2x4", []),
    ("diffugpt_m", "v5e:4x4", []),
    ("diffullama_7b", "v5e:4x8", []),
    ("diffullama_7b", "v5p:4x4x4", []),
    ("diffullama_7b", "v6e:4x8", []),
    ("efficient_dlm_1p5b", "v5e:4x8", []),
    ("efficient_dlm_4b", "v5p:4x4x4", []),
    ("efficient_dlm_8b", "v5p:4x4x8", []),
    ("efficient_dlm_8b", "v6e:8x8", []),
    ("diffugpt_s", "h200:1", []),
    ("diffugpt_m", "h200:8", []),
    ("diffullama_7b", "h100:8", []),
    ("diffullama_7b", "h200:8", []),
    ("efficient_dlm_1p5b", "h200:8", []),
    ("efficient_dlm_4b", "h200:8", []),
    ("efficient_dlm_8b", "h200:8", []),
]
# Two records a chip in one part; a copy of the model on every 64 chips.
WEAK = [("diffullama_7b", topology, [f"train.batch={2 * chips}", "train.accumulate=1", f"mesh.replica={chips // 64}"])
        for topology, chips in (("v5p:4x4x4", 64), ("v5p:4x8x8", 256), ("v5p:8x8x16", 1024))]


def report(config: str, topology: str, overrides: list[str], results: Path) -> dict:
    """What `dlm aot --json` says, or said before."""
    file = results / "_".join([config, topology.replace(":", "_"), *overrides]).replace("=", "-")
    if not file.exists():
        command = [sys.executable, "-m", "dlm_jax.cli", "aot", "--json", "--config", f"configs/{config}.py",
                   "--topology", topology, *(f"--config.{override}" for override in overrides)]
        print(" ".join(command[1:]), file=sys.stderr, flush=True)
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        results.mkdir(parents=True, exist_ok=True)
        file.write_text(done.stdout.splitlines()[-1])
    return json.loads(file.read_text())


def row(config: str, r: dict) -> str:
    """One line of the table of targets."""
    seconds = r["seconds"]
    return (f"| {config} | {r['topology']} ({r['chips']}) | {r['remat']} | {r['batch']} / {r['accumulate']} "
            f"| {r['arguments_gib']:.2f} | {r['temporaries_gib']:.2f} | {r['peak_gib']:.2f} of {r['capacity_gib']:.0f} "
            f"| {'yes' if r['fits'] else 'NO'} | {sum(r['collective_gib'].values()):.1f} "
            f"| {seconds['arithmetic']:.3g} | {seconds['links']:.2g} | {r['bound']} |")


def predicted(copies: int, shares: int) -> float:
    """GiB that a chip receives in a step of the 7B model in one part (see the text of the page)."""
    within = 3 * 2 * LAYERS + (2 + 4) * HEAD
    across = 4 * (LAYERS + 2 * HEAD) / shares if copies > 1 else 0
    return (within + across) / 2**30


def weak_row(r: dict) -> str:
    """One line of the table of weak scaling."""
    copies = r["chips"] // 64
    sent = sum(r["collective_gib"].values())
    return (f"| {r['topology']} | {r['chips']} | {copies} | {r['peak_gib']:.2f} | {sent:.1f} "
            f"| {predicted(copies, 64):.1f} | {r['seconds']['arithmetic']:.3g} | {r['seconds']['links']:.2g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "pods.md")
    parser.add_argument("--results", type=Path, default=ROOT / "runs" / "pods")
    a = parser.parse_args()
    targets = [row(config, report(config, topology, changes, a.results)) for config, topology, changes in TARGETS]
    weak = [weak_row(report(*each, a.results)) for each in WEAK]
    packages = "jax", "libtpu", "jax-cuda13-plugin"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    text = (ROOT / "benchmarks" / "pods.md.in").read_text().format(
        versions=versions, date=datetime.date.today(), targets="\n".join(targets), weak="\n".join(weak))
    a.out.write_text(text)
    if any("NO" in line for line in targets):
        sys.exit("a config does not fit its target; the table says which")


if __name__ == "__main__":
    main()
