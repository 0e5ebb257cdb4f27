"""What adaptation keeps and what it brings: the base, the base adapted, and the same model from random weights.

    python benchmarks/quality.py --base MODEL --data DIR --workdir DIR

DIR holds LAMBADA's, HellaSwag's and PIQA's files and TinyStories, each in its folder (docs/evaluation.md). The base is
asked left to right and sees the left of a hole; the others, trained on the same texts for the same number of steps, are
asked as they denoise and see both sides. Prints a table with 95 % intervals. Resumes where it stopped if interrupted.
"""

import argparse
import csv
import json
import platform
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import jax

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.data.text import read_documents
from dlm_jax.harness.charts import stderr
from dlm_jax.harness.infilling import COLUMNS, evaluate_infilling
from dlm_jax.harness.model import HarnessModel
from dlm_jax.harness.run import evaluate
from dlm_jax.harness.samples import evaluate_samples
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.sampling.settings import Settings

CONFIG = Path(__file__).parent.parent / "configs" / "tiny_stories.py"
SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"']?\s*")
TASKS = ("lambada_local", "hellaswag_local", "piqa_local")
COLUMNS_SHOWN = {"LAMBADA ppl": ("lambada_local", "perplexity"), "HellaSwag acc": ("hellaswag_local", "acc_norm"),
                 "PIQA acc": ("piqa_local", "acc"), "infilling ROUGE-L": ("infilling", "rougeL"),
                 "generative ppl": ("samples", "perplexity"), "distinct-2": ("samples", "distinct_2")}
STORIES = "tinystories/tinystories_val.jsonl"


def write_stories(path: Path, stories: Path, count: int) -> None:
    """The first five sentences of each story that has so many, as ROCStories lays them out."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS[:4], "RandomFifthSentenceQuiz1", COLUMNS[4]])
        for text in read_documents([stories]):
            sentences = [sentence.strip() for sentence in SENTENCE.findall(text)[:5]]
            if len(sentences) == 5 and count:
                writer.writerow([*sentences, "1"])
                count -= 1


def adapted(init: str, a: argparse.Namespace) -> LanguageModel:
    """The base, or random weights, trained as a diffusion model."""
    train, validation = a.data / "tinystories" / "tinystories_train_2316.jsonl", a.data / STORIES
    adapt(load_config(CONFIG, [f"recipe={a.recipe}", f"model.base={a.base}", f"model.init={init}",
                               f"data.train={train}", f"data.validation={validation}", f"train.steps={a.steps}",
                               f"evaluate.every={a.steps}"]), a.workdir / init)
    return load(a.workdir / init)


def kept(path: Path, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `measure` returns, or returned before."""
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found))
    return json.loads(path.read_text())


def measures(name: str, lm: LanguageModel, a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The metrics of each task."""
    folder = a.workdir / f"{name}-scores"
    results, _ = evaluate(HarnessModel(lm), TASKS, folder, str(a.data), limit=a.limit)
    results["infilling"] = kept(folder / "infilling.json", lambda: evaluate_infilling(
        lm, "rocstories_infill", str(a.workdir), Settings()))
    results["samples"] = kept(folder / "samples.json", lambda: evaluate_samples(
        lm, load(a.base), Settings(temperature=1.0), a.samples, a.max_tokens))
    return results


def shown(metrics: dict[str, Any], name: str) -> str:
    """A value with its 95 % interval, where one is known."""
    error = 1.96 * stderr(metrics, name)
    return f"{metrics[name]:.3g}" + (f" ± {error:.2g}" if error else "")


def main() -> None:
    """Trains, evaluates, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--recipe", default="diffullama")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--limit", type=int, default=100, help="documents of each task, and stories to fill")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    a = parser.parse_args()
    write_stories(a.workdir / "rocstories" / "cloze_test_val__spring2016.csv", a.data / STORIES, a.limit)
    models = {"base": load(a.base), "adapted": adapted("base", a), "from scratch": adapted("scratch", a)}
    print(f"{date.today()}, {platform.processor() or platform.machine()}, jax {jax.__version__}, {a.recipe}, "
          f"{a.steps} steps, {a.limit} documents of each task, {a.samples} samples of {a.max_tokens} tokens")
    print("| model |", " | ".join(COLUMNS_SHOWN), "|")
    print("|---|" + "---:|" * len(COLUMNS_SHOWN))
    for name, lm in models.items():
        found = measures(name, lm, a)
        print(f"| {name} |", " | ".join(shown(found[task], metric) for task, metric in COLUMNS_SHOWN.values()), "|",
              flush=True)


if __name__ == "__main__":
    main()
