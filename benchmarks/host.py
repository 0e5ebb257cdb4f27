"""What a run's host does: its time between steps, and how fast its records come, against what a TPU host consumes.

    python benchmarks/host.py

Both in one run, medians. The time between steps is the `host_seconds` that `dlm train` logs: putting the records on
devices, writing the log, watching. It is measured on fake CPU devices with a tiny model, and once more with steps that
compute nothing: devices that are not the host's own cores take no time from it. Records are read as training reads
them, by one process, per second of CPU.
"""

import argparse
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
CONSUMED = 4 * 6550  # tokens a second of the four chips of a v5p host at 7B (arXiv 2507.05411)
TINY = ["train.steps=400", "train.batch=8", "train.accumulate=1", "data.length=16", "recipe.anneal_steps=0",
        "optimizer.warmup=0", "checkpoint.every=1000", "evaluate.every=1000", "data.validation_records=8",
        "log.every=20"]


def train(workdir: Path, empty: bool) -> None:
    """A run, with steps that compute nothing where they are to be empty."""
    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config
    from dlm_jax.training import loop
    if empty:
        loop.make_step = empty_step
    adapt(load_config(ROOT / "configs" / "tiny.py", TINY), workdir)


def empty_step(*_: object) -> Callable:
    """In place of `make_step`: the state as it is, but for its number."""
    zeros = dict.fromkeys(("loss", "masked_loss", "gradient_norm", "learning_rate", "skipped_in_a_row", "skipped"), 0.0)
    return jax.jit(lambda state, *rows: (state.replace(step=state.step + 1), jax.tree.map(jnp.float32, zeros)),
                   donate_argnums=0)


def milliseconds(devices: int, steps: str, workdir: Path) -> dict[str, float]:
    """A step's, by kind, on as many fake devices: medians over the logged intervals after the first ten."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu",
                                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    subprocess.run([sys.executable, __file__, "--run", steps, str(workdir)], env=environment, check=True,
                   capture_output=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][10:]
    return {kind: 1000 * statistics.median(line[kind] for line in lines)
            for kind in ("host_seconds", "data_seconds", "seconds_per_step")}


def reading(directory: Path, length: int = 2048, records: int = 4096) -> float:
    """Tokens a second of `Dataset.batches`, in seconds of CPU, so that other threads do not help."""
    from dlm_jax.data.dataset import Dataset
    from dlm_jax.data.prepare import prepare
    from dlm_jax.opening import open_bundle, open_tokenizer
    tokenizer = open_tokenizer(open_bundle("bundled"))
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
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)  # what `milliseconds` starts: steps, work directory
    asked = parser.parse_args().run
    if asked:
        return train(Path(asked[1]), asked[0] == "empty")
    print("| devices | steps | host (ms) | waiting for records (ms) | whole step (ms) |\n|---:|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for devices in (1, 4, 8):
            for steps in ("empty", "real"):
                host, data, whole = milliseconds(devices, steps, Path(folder) / f"{steps}{devices}").values()
                print(f"| {devices} | {steps} | {host:.2f} | {data:.2f} | {whole:.2f} |", flush=True)
        rate = statistics.median(reading(Path(folder) / f"records{i}") for i in range(3))
    print(f"\nrecords of 2048 tokens: {rate / 1e6:.1f}M tokens a second and core, {rate / CONSUMED:.0f} times what a "
          "v5p host consumes at 7B (4 x 6,550 tokens/s)")


if __name__ == "__main__":
    main()
