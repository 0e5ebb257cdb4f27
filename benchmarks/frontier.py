"""Quality against speed: an autoregressive model and the diffusion model made of it, on text that can be checked.

    python benchmarks/frontier.py records --workdir DIR --figure docs/frontier.png
    python benchmarks/frontier.py countdown --workdir DIR
    python benchmarks/frontier.py records --workdir DIR --shape 192x8 --ar-steps 600

records: a line of data becomes JSON, graded by exact match. countdown: reach a number from others by arithmetic,
graded by a checker. For each seed the base, or with --shape a model of random weights, is trained left to right, and
the result is converted by `--recipe` on the same pairs. Both answer the same held-out questions, greedily: one at a
time, and all in one batch. Times exclude compilation. Prints means and standard deviations over the seeds; also writes
DIR/frontier.json. Resumes where it stopped if interrupted.
"""

import argparse
import dataclasses
import itertools
import json
import platform
from collections.abc import Callable
from datetime import date
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from finetune import CONFIG, countdown, end_tokens
from forward_width import llama
from train_step import processor

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.data.contacts import contacts
from dlm_jax.data.pairs import prepare_pairs
from dlm_jax.diffusion.recipes import RECIPES
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.models.weights import init
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings
from dlm_jax.training.rewards import reaches_target

Pair = tuple[str, str]  # question and answer
AR = "autoregressive"


def countdown_pairs(count: int) -> list[Pair]:
    """Different puzzles of two numbers up to 99."""
    return [(puzzle["input"], puzzle["output"]) for puzzle in countdown(count, 2, 99)]


# task: (makes so many pairs, whether a text answers a question)
TASKS: dict[str, tuple[Callable[[int], list[Pair]], Callable[[Pair, str], bool]]] = {
    "records": (lambda count: list(itertools.islice(contacts(0), count)), lambda pair, text: text == pair[1]),
    "countdown": (countdown_pairs, lambda pair, text: reaches_target(pair[0], text)),
}


def random_base(shape: str, workdir: Path) -> Path:
    """Saves a model of random weights, "widthxdepth", with the bundled tokenizer, and returns where."""
    directory, config = workdir / "base", llama(*map(int, shape.split("x")))
    if not directory.exists():
        bundled = load("bundled")
        dataclasses.replace(bundled, params=init(config, jax.random.key(0)), config=config).save(directory)
    return directory


def train(recipe: str, base: str | Path, steps: int, pairs: list[Pair], seed: int, a: argparse.Namespace
          ) -> LanguageModel:
    """The model that `base` becomes by a recipe on the pairs; resumes if interrupted."""
    count = end_tokens(RECIPES[recipe])
    records = a.workdir / f"records-{count}"
    if not records.exists():
        prepare_pairs(pairs, load(a.base).text_tokenizer(), a.length, records, count)
    changes = {"recipe": recipe, "model.base": base, "data.train": records, "data.validation": records,
               "data.seq_length": a.length, "train.steps": steps, "train.seed": seed, "evaluate.every": steps,
               "checkpoint.every": max(steps // 4, 1), "optimizer.learning_rate": a.learning_rate}
    workdir = a.workdir / f"{recipe}-{seed}"
    adapt(load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()]), workdir)
    return load(workdir)


def answer(lm: LanguageModel, pairs: list[Pair], strategy: str, a: argparse.Namespace) -> tuple[list[Sample], float]:
    """The answers to one batch of questions, and how many tokens per second that wrote."""
    settings = Settings() if strategy == AR else Settings(unmasking=strategy)
    samples = lm.fill([lm.continuation(question + "\n", a.max_tokens) for question, _ in pairs], settings)
    return samples, samples[0].cost.tokens_per_second


def measure(lm: LanguageModel, strategy: str, test: list[Pair], a: argparse.Namespace) -> dict[str, float]:
    """Share of right answers, tokens per forward pass, and tokens per second alone and in a batch."""
    grade = TASKS[a.task][1]
    samples, batched = answer(lm, test, strategy, a)
    texts = [lm.text_tokenizer().decode(s.tokens[len(lm.encode(q + "\n")):]) for s, (q, _) in zip(samples, test)]
    alone = [answer(lm, [pair], strategy, a)[0][0] for pair in test[:a.alone] for _ in range(3)]
    return {"right": float(np.mean([grade(pair, text) for pair, text in zip(test, texts)])),
            "per_forward": sum(s.new_tokens for s in samples) / sum(s.nfe for s in samples),
            "alone": sum(s.new_tokens for s in alone) / sum(s.cost.seconds for s in alone), "batched": batched}


def run_seed(seed: int, train_pairs: list[Pair], test: list[Pair], a: argparse.Namespace
             ) -> dict[str, dict[str, float]]:
    """The figures of each way to decode, for one seed."""
    base = train("ar", a.base, a.ar_steps, train_pairs, seed, a)
    found = {AR: measure(base, AR, test, a)}
    converted = train(a.recipe, a.workdir / f"ar-{seed}", a.steps, train_pairs, seed, a)
    for strategy in a.strategies.split(","):
        found[strategy] = measure(converted, strategy, test, a)
    for figures in found.values():
        figures["times_alone"] = figures["alone"] / found[AR]["alone"]
        figures["times_batched"] = figures["batched"] / found[AR]["batched"]
    return found


def table(seeds: list[dict[str, dict[str, float]]]) -> str:
    """A row per way to decode: mean and standard deviation over the seeds."""
    columns = {"right": "right", "per_forward": "tokens per forward", "alone": "tokens/s alone", "times_alone": "x AR",
               "batched": "tokens/s in a batch", "times_batched": "x AR"}
    lines = ["| decoding | " + " | ".join(columns.values()) + " |", "|---" + "|---:" * len(columns) + "|"]
    for way in seeds[0]:
        cells = []
        for key in columns:
            values = np.array([seed[way][key] for seed in seeds]) * (100 if key == "right" else 1)
            digits = 0 if key in ("alone", "batched") else 1 if key == "right" else 2
            spread = f" ± {values.std(ddof=1):,.{digits}f}" if len(seeds) > 1 else ""
            cells.append(f"{values.mean():,.{digits}f}{' %' if key == 'right' else ''}{spread}")
        lines.append(f"| {way} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(seeds: list[dict[str, dict[str, float]]], task: str, file: Path) -> None:
    """The share of right answers against tokens per forward pass, and against tokens per second."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
    labels = {"per_forward": "tokens per forward pass", "alone": "tokens per second, alone"}
    for axis, (key, label) in zip(axes, labels.items()):
        for way in seeds[0]:
            x, y = (np.array([seed[way][name] for seed in seeds]) for name in (key, "right"))
            spread = {"xerr": x.std(ddof=1), "yerr": 100 * y.std(ddof=1)} if len(seeds) > 1 else {}
            axis.errorbar(x.mean(), 100 * y.mean(), **spread, fmt="s" if way == AR else "o", capsize=3, label=way)
        axis.set(xlabel=label, xlim=(0, None), ylim=(0, 105))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"{task}: right, %")
    axes[1].legend(loc="lower left", fontsize=8)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Trains, decodes, prints and draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--base", default="bundled")
    parser.add_argument("--shape", help="start from random weights of this width and depth, such as 192x8")
    parser.add_argument("--recipe", default="hybrid_shifted")
    parser.add_argument("--strategies", default="threshold:0.5,threshold:0.9,threshold:0.99,speculate,speculate:4")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ar-steps", type=int, default=300)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--length", type=int, default=128, help="tokens per record")
    parser.add_argument("--max-tokens", type=int, default=96, help="the longest answer")
    parser.add_argument("--train", type=int, default=20_000, help="pairs to learn from")
    parser.add_argument("--test", type=int, default=100, help="questions to answer")
    parser.add_argument("--alone", type=int, default=20, help="of these, how many are also answered alone, three times")
    parser.add_argument("--figure", type=Path, help="where to draw it")
    a = parser.parse_args()
    a.base = random_base(a.shape, a.workdir) if a.shape else a.base
    pairs = TASKS[a.task][0](a.train + a.test)
    test, train_pairs = pairs[:a.test], pairs[a.test:]
    seeds = [run_seed(seed, train_pairs, test, a) for seed in range(a.seeds)]
    (a.workdir / "frontier.json").write_text(json.dumps(seeds, indent=2) + "\n")
    print(f"{a.task}: {a.ar_steps} steps of ar, then {a.steps} of {a.recipe}, {a.seeds} seeds, {a.test} questions; "
          f"{date.today()}, {processor()}, Python {platform.python_version()}, jax {jax.__version__}")
    print(table(seeds))
    if a.figure:
        draw(seeds, a.task, a.figure)


if __name__ == "__main__":
    main()
