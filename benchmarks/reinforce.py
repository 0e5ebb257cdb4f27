"""Countdown by reward: what GRPO adds to a diffusion model that was fine-tuned on the puzzles.

    python benchmarks/reinforce.py --base MODEL --workdir DIR

For each seed the base is fine-tuned by `--recipe` on puzzles with answers, then trained by the reward of its own
answers to the same puzzles (`configs/countdown_grpo.py`), and both answer the same held-out puzzles, greedily. Prints
the share solved, with the mean and standard deviation over the seeds. Resumes where it stopped if interrupted.
"""

import argparse
import platform
from datetime import date
from pathlib import Path

import jax
import numpy as np
from frontier import AR, Pair, countdown_pairs, measure, train
from train_step import processor

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.language_model import load

CONFIG = Path(__file__).parent.parent / "configs" / "countdown_grpo.py"


def run_seed(seed: int, pairs: list[Pair], test: list[Pair], a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of each model under each strategy, the base fine-tuned left to right among them."""
    ar = train("ar", a.base, a.steps, pairs, seed, a)
    tuned = train(a.recipe, a.base, a.steps, pairs, seed, a)
    records = a.workdir / "records-16"
    changes = {"model.base": a.workdir / f"{a.recipe}-{seed}", "data.train": records, "data.validation": records,
               "train.seed": seed, "train.steps": a.grpo_steps, "evaluate.every": a.grpo_steps}
    adapt(load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()]), a.workdir / f"grpo-{seed}")
    found = {AR: measure(ar, AR, test, a)}
    for name, lm in (("fine-tuned", tuned), ("after GRPO", load(a.workdir / f"grpo-{seed}"))):
        found |= {f"{name}, {strategy}": measure(lm, strategy, test, a) for strategy in a.strategies.split(",")}
    return found


def main() -> None:
    """Trains both, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--recipe", default="hybrid_shifted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning")
    parser.add_argument("--grpo-steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of fine-tuning")
    parser.add_argument("--strategies", default="threshold:0.9,speculate,speculate:4")
    parser.add_argument("--length", type=int, default=128, help="tokens per record")
    parser.add_argument("--max-tokens", type=int, default=32, help="the longest answer")
    parser.add_argument("--train", type=int, default=10_000, help="puzzles to learn from")
    parser.add_argument("--test", type=int, default=200, help="puzzles to solve")
    parser.set_defaults(task="countdown", alone=1)
    a = parser.parse_args()
    puzzles = countdown_pairs(a.train + a.test)
    seeds = [run_seed(seed, puzzles[a.test:], puzzles[:a.test], a) for seed in range(a.seeds)]
    print(f"{a.steps} steps of {a.recipe}, then {a.grpo_steps} of GRPO, {a.seeds} seeds, {a.test} puzzles, "
          f"{date.today()}, {processor()}, Python {platform.python_version()}, jax {jax.__version__}")
    print("| model | solved | per seed | tokens per forward |")
    print("|---|---:|---|---:|")
    for name in seeds[0]:
        found = [seed[name] for seed in seeds]
        solved = np.array([figures["right"] for figures in found])
        spread = f" ± {solved.std(ddof=1):.1%}" if len(solved) > 1 else ""
        print(f"| {name} | {solved.mean():.1%}{spread} | {', '.join(f'{x:.1%}' for x in solved)} | "
              f"{np.mean([figures['per_forward'] for figures in found]):.2f} |")


if __name__ == "__main__":
    main()
