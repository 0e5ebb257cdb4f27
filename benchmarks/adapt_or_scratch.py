"""Does adaptation pay off? Each objective from the base and from random weights: same steps, same data, same noise.

    python benchmarks/adapt_or_scratch.py --base MODEL --train TRAIN.jsonl --validation VALIDATION.jsonl --workdir DIR

Prints a table of the validation NELBO in nats per token against the training step and plots it as DIR/curves.png.
Resumes where it stopped if interrupted.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import jax
import matplotlib

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIGS = Path(__file__).parent.parent / "configs"
OBJECTIVES = {"one stream, shifted (DiffuLLaMA)": "tiny_stories.py",
              "two streams, block 16 (BD3-LM)": "tiny_stories_blocks.py"}
COLORS = ("#3465a4", "#c17d11")


def curve(objective: str, init: str, a: argparse.Namespace) -> dict[int, float]:
    """Trains one run, or resumes it; step -> validation NELBO."""
    workdir = a.workdir / f"{Path(OBJECTIVES[objective]).stem}-{init}"
    adapt(load_config(CONFIGS / OBJECTIVES[objective], [
        f"model.base={a.base}", f"model.init={init}", f"data.train={a.train}", f"data.validation={a.validation}",
        f"data.seq_length={a.seq_length}", f"train.steps={a.steps}"]), workdir)
    lines = (workdir / "validation.jsonl").read_text().splitlines()
    return {record["step"]: record["nelbo"] for record in map(json.loads, lines)}


def draw(curves: dict[tuple[str, str], dict[int, float]], path: Path) -> None:
    """One line per run: solid from the base, dashed from scratch."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for (objective, init), points in curves.items():
        color = COLORS[list(OBJECTIVES).index(objective)]
        axes.plot(points.keys(), points.values(), color=color, linestyle="-" if init == "base" else "--",
                  label=f"{objective}, from {'the AR base' if init == 'base' else 'scratch'}")
    axes.set(xlabel="training step", ylabel="validation NELBO [nats/token]")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs all four conversions, then prints the table and saves the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--train", "--validation"):
        parser.add_argument(name, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seq-length", type=int, default=128, help="tokens per record")
    a = parser.parse_args()
    curves = {(objective, init): curve(objective, init, a) for objective in OBJECTIVES for init in ("base", "scratch")}
    steps = next(iter(curves.values())).keys()
    print(f"{date.today()}, {platform.processor() or platform.machine()}, jax {jax.__version__}")
    print("| objective | start |", " | ".join(f"step {s}" for s in steps), "|")
    print("|---|---|" + "---:|" * len(steps))
    for (objective, init), points in curves.items():
        print(f"| {objective} | {init} |", " | ".join(f"{points[s]:.3f}" for s in steps), "|")
    draw(curves, a.workdir / "curves.png")


if __name__ == "__main__":
    main()
