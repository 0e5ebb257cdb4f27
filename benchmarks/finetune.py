"""A base, fine-tuned on questions and answers as an autoregressive model and as a diffusion model, and their scores.

    python benchmarks/finetune.py countdown --base MODEL --workdir DIR
    python benchmarks/finetune.py gsm8k --data DIR --base MODEL --workdir DIR --recipes ar,diffullama --length 256

countdown: reach a number from others by arithmetic; its questions are made here, and none is in both splits.
gsm8k: `train.jsonl` and `test.jsonl` of DIR; with --chat in the tokenizer's chat format.

Both start from the same weights and see the same batches. Prints a table with 95 % intervals and where they differ by
more than noise. Resumes where it stopped if interrupted.
"""

import argparse
import json
import platform
import random
from datetime import date
from pathlib import Path
from typing import Any

import jax

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.data.pairs import prepare_pairs, read_pairs
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.diffusion.recipes import RECIPES
from dlm_jax.harness.charts import stderr
from dlm_jax.harness.compare import compare
from dlm_jax.harness.model import HarnessModel
from dlm_jax.harness.run import evaluate
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.training.rewards import OPERATIONS

CONFIG = Path(__file__).parent.parent / "configs" / "tiny_stories.py"


def countdown(count: int, numbers: int, largest: int) -> list[dict[str, str]]:
    """Different puzzles with a solution: input '3,8,5,6' (the target last) and output '8-5=3,3+3=6'."""
    chance, puzzles = random.Random(0), {}
    for _ in range(50 * count):
        if len(puzzles) == count:
            break
        given = [chance.randint(1, largest) for _ in range(numbers)]
        left, steps = list(given), []
        while len(left) > 1:
            a, b = left.pop(chance.randrange(len(left))), left.pop(chance.randrange(len(left)))
            name = chance.choice("+-*/")
            result = OPERATIONS[name](a, b)
            if result is None or not 0 < result <= 10 * largest:
                break
            left.append(result)
            steps.append(f"{a}{name}{b}={result}")
        else:
            puzzles[",".join(map(str, [*given, *left]))] = ",".join(steps)
    else:
        raise SystemExit(f"there are hardly {count} puzzles of {numbers} numbers up to {largest}; raise --largest or "
                         "--numbers, or lower --train")
    return [{"input": asked, "output": answer} for asked, answer in puzzles.items()]


def write_countdown(folder: Path, a: argparse.Namespace) -> None:
    """Both splits as files."""
    folder.mkdir(parents=True, exist_ok=True)
    puzzles = countdown(a.train + a.test, a.numbers, a.largest)
    pairs = [{"prompt": each["input"], "answer": each["output"]} for each in puzzles[a.test:]]
    for name, lines in (("cd3_test.jsonl", puzzles[:a.test]), ("train.jsonl", pairs)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))


def end_tokens(recipe: Recipe) -> int | None:
    """How many end tokens an answer is trained with: one if the model writes left to right, enough to end its block,
    or a record of them (None) where nothing else says how long an answer is."""
    return 1 if recipe.corruption == "none" else recipe.block_size if recipe.streams == 2 else None


def finetune(name: str, folder: Path, a: argparse.Namespace) -> LanguageModel:
    """Trains with the recipe, or resumes."""
    count = end_tokens(RECIPES[name])
    records = a.workdir / f"records-{'filled' if count is None else count}"
    if not records.exists():
        prepare_pairs(read_pairs([folder / "train.jsonl"]), load(a.base).text_tokenizer(), a.length, records, count,
                      a.chat)
    changes = {"recipe": name, "model.base": a.base, "data.train": records, "data.validation": records,
               "data.seq_length": a.length, "train.steps": a.steps, "evaluate.every": a.steps,
               "checkpoint.every": max(a.steps // 4, 1), "optimizer.learning_rate": a.learning_rate}
    adapt(load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()]), a.workdir / name)
    return load(a.workdir / name)


def score(name: str, folder: Path, a: argparse.Namespace) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The metrics of a model, fine-tuned, and its documents with what was answered."""
    task = "gsm8k_chat" if a.chat else f"{a.task}_finetuned"
    model = HarnessModel(finetune(name, folder, a), unmasking=a.unmasking)
    results, samples = evaluate(model, [task], a.workdir / name / "scores", str(folder), apply_chat_template=a.chat,
                                limit=a.test)
    return results[task], samples[task]


def main() -> None:
    """Fine-tunes with every recipe, then prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=["countdown", "gsm8k"])
    parser.add_argument("--base", required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="the folder of GSM8K's files")
    parser.add_argument("--recipes", default="ar,hybrid_shifted", help="the first is what the others are compared with")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--length", type=int, default=128, help="tokens per record")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--unmasking", default="threshold:0.9")
    parser.add_argument("--chat", action="store_true", help="ask in the tokenizer's chat format")
    parser.add_argument("--numbers", type=int, default=2, help="of a Countdown puzzle, without its target")
    parser.add_argument("--largest", type=int, default=99, help="of these numbers")
    parser.add_argument("--train", type=int, default=10_000, help="puzzles to learn from")
    parser.add_argument("--test", type=int, default=200, help="questions to answer")
    a = parser.parse_args()
    folder = a.data
    if a.task == "countdown":
        folder = a.workdir / "data"
        if not (folder / "train.jsonl").exists():
            write_countdown(folder, a)
    elif folder is None:
        parser.error("gsm8k reads files; name their folder with --data")
    scores = {name: score(name, folder, a) for name in a.recipes.split(",")}
    first, *_ = scores
    print(f"{date.today()}, {platform.processor() or platform.machine()}, jax {jax.__version__}, {a.unmasking}")
    print("| recipe | score | 95 % interval | tokens per forward | against", first, "|")
    print("|---|---:|---|---:|---|")
    for name, (metrics, samples) in scores.items():
        metric = next(iter(metrics))
        value, error = metrics[metric], 1.96 * stderr(metrics, metric)
        found = compare(samples, scores[first][1])[metric]
        print(f"| {name} | {value:.1%} | {value - error:.1%} to {value + error:.1%} | "
              f"{metrics['tokens_per_forward']:.2f} | "
              f"{found.difference:+.1%} ({found.low:+.1%} to {found.high:+.1%}) |")


if __name__ == "__main__":
    main()
