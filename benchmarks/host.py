"""What a run's host does: its time between steps, and how fast its records come, against what a TPU host consumes.

    python benchmarks/host.py

Both in one run, medians. The time between steps is the `host_seconds` that `dlm train` logs: handing a step over,
putting its records on devices, writing the log; on fake CPU devices, with a model so small that little else happens.
Records are read as training reads them, by one process, per second of CPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CONSUMED = 4 * 6550  # tokens a second of the four chips of a v5p host at 7B (arXiv 2507.05411)
TINY = ["train.steps=400", "train.batch=8", "train.accumulate=1", "data.length=16", "recipe.anneal_steps=0",
        "optimizer.warmup=0", "checkpoint.every=1000", "evaluate.every=1000", "data.validation_records=8",
        "log.every=20"]


def between_steps(devices: int, workdir: Path) -> dict[str, float]:
    """Milliseconds a step of each kind, median over logged intervals after the first ten."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu",
                                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    subprocess.run([sys.executable, "-m", "dlm_jax.cli", "train", "--config", str(ROOT / "configs" / "tiny.py"),
                    "--workdir", str(workdir), *(f"--config.{change}" for change in TINY)],
                   env=environment, check=True, capture_output=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()][10:]
    return {kind: 1000 * statistics.median(line[f"{kind}_seconds"] for line in lines) for kind in ("host", "data")} | {
        "step": 1000 * statistics.median(line["seconds_per_step"] for line in lines)}


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
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for devices in (1, 8):
            found = between_steps(devices, Path(folder) / f"run{devices}")
            print(f"{devices} devices, ms a step: host {found['host']:.2f}, waiting for records {found['data']:.3f}, "
                  f"whole step {found['step']:.2f}")
        rate = statistics.median(reading(Path(folder) / f"records{i}") for i in range(3))
    print(f"records of 2048 tokens: {rate / 1e6:.1f}M tokens a second and core, {rate / CONSUMED:.0f} times what a "
          "v5p host consumes at 7B (4 x 6,550 tokens/s)")


if __name__ == "__main__":
    main()
