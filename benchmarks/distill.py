"""Countdown, distilled: how many tokens a model commits per forward pass once it has learned from its own answers.

    python benchmarks/distill.py --base MODEL --workdir DIR

For each seed the base is fine-tuned by `hybrid_shifted` on puzzles with answers, answers the puzzles it was tuned on,
one token per step, and is trained on its own right answers by `dparallel` (certainty-forcing), once with the entropy
term and once without it, for comparison. All answer the same held-out puzzles, greedily. Prints mean and standard
deviation over the seeds. Resumes where it stopped if interrupted; DIR may be that of `reinforce.py`.
"""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

import jax
import numpy as np
from finetune import CONFIG
from frontier import Pair, countdown_pairs, measure, train
from train_step import processor

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.data.pairs import prepare_pairs
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.training.rewards import reaches_target


def own_answers(lm: LanguageModel, puzzles: list[Pair], a: argparse.Namespace) -> list[Pair]:
    """The model's right answers, decoded one token per step."""
    found = []
    for first in range(0, len(puzzles), a.batch):
        prompts = [question + "\n" for question, _ in puzzles[first:first + a.batch]]
        for prompt, sample in zip(prompts, lm.sample(prompts, max_tokens=a.max_tokens, unmasking="confidence")):
            text = lm.text_tokenizer().decode(sample.tokens[len(lm.encode(prompt)):])
            if reaches_target(prompt.strip(), text):
                found.append((prompt[:-1], text))
    return found


def distilled(lm: LanguageModel, seed: int, weight: float, puzzles: list[Pair], a: argparse.Namespace) -> LanguageModel:
    """The model after training on its own right answers."""
    records = a.workdir / f"own-{seed}"
    if not records.exists():
        prepare_pairs(own_answers(lm, puzzles, a), lm.text_tokenizer(), a.length, records, 16)
    tuned, workdir = a.workdir / f"hybrid_shifted-{seed}", a.workdir / f"dparallel-{weight:g}-{seed}"
    changes = {"recipe": "dparallel", "recipe.certainty_weight": weight, "model.base": tuned, "data.train": records,
               "data.validation": records, "data.seq_length": a.length, "train.seed": seed,
               "train.steps": a.distill_steps, "evaluate.every": a.distill_steps,
               "checkpoint.every": max(a.distill_steps // 4, 1), "optimizer.learning_rate": a.distill_rate}
    adapt(load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()]), workdir)
    return load(workdir)


def run_seed(seed: int, pairs: list[Pair], test: list[Pair], a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of each model under each threshold."""
    tuned = train("hybrid_shifted", a.base, a.steps, pairs, seed, a)
    models = {"fine-tuned": tuned}
    for weight in (0.0, 2.0):
        models[f"own answers, certainty {weight:g}"] = distilled(tuned, seed, weight, pairs[:a.answers], a)
    return {f"{name}, {strategy}": measure(lm, strategy, test, a)
            for name, lm in models.items() for strategy in a.strategies.split(",")}


def main() -> None:
    """Trains, decodes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="of fine-tuning")
    parser.add_argument("--answers", type=int, default=8000, help="puzzles that the model answers for itself")
    parser.add_argument("--batch", type=int, default=256, help="of these at a time")
    parser.add_argument("--distill-steps", type=int, default=300)
    parser.add_argument("--distill-rate", type=float, default=5e-4)
    parser.add_argument("--strategies", default="threshold:0.9,threshold:0.7,speculate:4")
    parser.add_argument("--length", type=int, default=128, help="tokens per record")
    parser.add_argument("--max-tokens", type=int, default=32, help="the longest answer")
    parser.add_argument("--train", type=int, default=10_000, help="puzzles to learn from")
    parser.add_argument("--test", type=int, default=200, help="puzzles to solve")
    parser.set_defaults(task="countdown", alone=1)
    a = parser.parse_args()
    puzzles = countdown_pairs(a.train + a.test)
    seeds = [run_seed(seed, puzzles[a.test:], puzzles[:a.test], a) for seed in range(a.seeds)]
    (a.workdir / "distill.json").write_text(json.dumps(seeds, indent=2) + "\n")
    print(f"{a.steps} steps of hybrid_shifted, then {a.distill_steps} on own answers, {a.seeds} seeds, {a.test} "
          f"puzzles; {date.today()}, {processor()}, Python {platform.python_version()}, jax {jax.__version__}")
    print("| model | solved | tokens per forward |")
    print("|---|---:|---:|")
    for way in seeds[0]:
        cells = []
        for key, scale, digits in (("right", 100, 1), ("per_forward", 1, 2)):
            values = scale * np.array([seed[way][key] for seed in seeds])
            cells.append(f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if a.seeds > 1 else ""))
        print(f"| {way} | {cells[0]} % | {cells[1]} |")


if __name__ == "__main__":
    main()
