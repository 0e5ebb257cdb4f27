"""What the host of a run does: its time between steps, and how fast it reads records, against what a TPU host consumes.

    python benchmarks/host.py

Both in one run, medians. The time between steps is the `host_seconds` that `dlm train` logs: placing the records on the
devices, logging, watching. It is measured on fake CPU devices with a tiny model, and again with steps that compute
nothing, because real devices take no time from the host's own cores. Records are read as training reads them, by one
process, per second of CPU time.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

ROOT = Path(__file__).resolve().parents[1]
CONSUMED = 4 * 6550  # tokens per second on the four chips of a v5p host at 7B (arXiv 2507.05411)
TINY = ["train.global_batch_size=8", "train.grad_accum_steps=1", "data.seq_length=16", "recipe.anneal_steps=0",
        "optimizer.warmup_steps=0", "checkpoint.every=1000", "evaluate.every=1000", "data.validation_records=8"]


def train(workdir: Path, empty: bool, steps: int) -> None:
    """A run, with real steps or with empty ones, which compute nothing."""
    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config
    from dlm_jax.training import run
    if empty:
        run.make_step = empty_step
    overrides = [*TINY, f"train.steps={steps}", f"log.every={steps // 20}"]
    adapt(load_config(ROOT / "configs" / "tiny.py", overrides), workdir)


def empty_step(*_: object) -> Callable:
    """Replaces `make_step`: only the step counter of the state changes."""
    zeros = dict.fromkeys(("loss", "masked_loss", "gradient_norm", "learning_rate", "skipped_in_a_row", "skipped"), 0.0)
    return jax.jit(lambda state, *rows: (dataclasses.replace(state, step=state.step + 1),
                                         jax.tree.map(jnp.float32, zeros)), donate_argnums=0)


def milliseconds(devices: int, kind: str, steps: int, workdir: Path) -> dict[str, float]:
    """Of a step, by what they are spent on, on this many fake devices: medians over the logged intervals after the
    first ten. kind: 'empty' or 'real' steps."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu",
                                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    subprocess.run([sys.executable, __file__, "--run", kind, str(workdir), "--steps", str(steps)], env=environment,
                   check=True, capture_output=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][10:]
    return {part: 1000 * statistics.median(line[part] for line in lines)
            for part in ("host_seconds", "data_seconds", "seconds_per_step")}


def read_rate(directory: Path, records: int, length: int = 2048) -> float:
    """Tokens that `Dataset.batches` reads per second of CPU time, so that more threads do not help."""
    from dlm_jax.data.dataset import Dataset
    from dlm_jax.data.prepare import prepare
    from dlm_jax.loading import load_bundle, load_tokenizer
    tokenizer = load_tokenizer(load_bundle("bundled"))
    text = "def f(x):\n    return [y for y in x if y is not None]\n" * 2000
    prepare([text] * (records * length // 32_000), tokenizer, length, directory)
    batches = Dataset.open(directory).batches(32, 0)
    next(batches)
    start, count = time.process_time(), 60
    for _ in range(count):
        next(batches)
    seconds = time.process_time() - start
    batches.close()
    return count * 32 * length / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # used by `milliseconds`: steps, work directory
    parser.add_argument("--steps", type=int, default=400, help="steps of each run, a multiple of 20")
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 4, 8))
    parser.add_argument("--records", type=int, default=4096, help="how many records are prepared and read")
    a = parser.parse_args()
    if a.run:
        kind, workdir = a.run
        return train(Path(workdir), kind == "empty", a.steps)
    print("| devices | steps | host (ms) | waiting for records (ms) | full step (ms) |\n|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for devices in a.devices:
            for kind in ("empty", "real"):
                host, data, step = milliseconds(devices, kind, a.steps, Path(folder) / f"{kind}{devices}").values()
                print(f"| {devices} | {kind} | {host:.2f} | {data:.2f} | {step:.2f} |", flush=True)
        rate = statistics.median(read_rate(Path(folder) / f"records{i}", a.records) for i in range(3))
    print(f"\nrecords of 2048 tokens: {rate / 1e6:.1f}M tokens per second and core, {rate / CONSUMED:.0f} times what a "
          "v5p host consumes at 7B (4 x 6,550 tokens/s)")


if __name__ == "__main__":
    main()
