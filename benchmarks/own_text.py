"""Converted on text, or on what the base writes itself: how many tokens per forward pass each gives, and how good.

    python benchmarks/own_text.py --base MODEL --text TRAIN.jsonl --validation VALIDATION.jsonl --workdir DIR

For each seed the base is converted by `--recipe` twice, with as many steps: on the text, and on its own greedy
continuations of the beginnings of that text. Both continue held-out beginnings. A text's quality is its negative log
likelihood under the base, with the share of distinct bigrams beside it, since a text that repeats itself is likely too.
Prints means and standard deviations over the seeds. Resumes where it stopped if interrupted.
"""

import argparse
import ast
import contextlib
import functools
import json
import platform
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from frontier import AR
from train_step import processor

from dlm_jax.adapt import adapt
from dlm_jax.commands.self_generate import write_samples
from dlm_jax.config import load_config
from dlm_jax.data.source import STDLIB
from dlm_jax.data.text import python_stdlib_files, read_documents
from dlm_jax.diffusion.cross_entropy import cross_entropy
from dlm_jax.harness.samples import share_distinct
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings

CONFIG = Path(__file__).parent.parent / "configs" / "tiny_stories_blocks.py"
BEGINNINGS = (8, 13, 20, 30)  # tokens of a text that start a continuation


@functools.cache
def documents(source: str, held_out: bool) -> list[str]:
    """The texts of a file, or the functions and classes of Python's standard library, from files that the bundled base
    has read or from those that it has not."""
    if source != STDLIB:
        return list(read_documents([source]))
    found = []
    for file in python_stdlib_files()[held_out]:
        text = file.read_text(encoding="utf-8", errors="ignore")
        with contextlib.suppress(SyntaxError, ValueError):
            nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
            found += [ast.get_source_segment(text, node) or "" for node in nodes]
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order if len(found[i]) > 400]


def own_text(base: LanguageModel, a: argparse.Namespace, beginnings: Sequence[int] = BEGINNINGS) -> str:
    """The base's continuations of beginnings of several lengths, as a source for training."""
    files = []
    for tokens in beginnings:
        file = a.workdir / f"own-{tokens}.jsonl"
        if not file.exists():
            texts = documents(a.text, held_out=False)[:a.documents]
            write_samples(base, file, len(texts), a.own_tokens, Settings(), prompts=texts, prompt_tokens=tokens,
                          batch=256)
        files.append(f"{file}:1")
    return ",".join(files)


def converted(name: str, source: str, seed: int, a: argparse.Namespace) -> LanguageModel:
    """The base after its conversion on a source."""
    changes = {"recipe": a.recipe, "model.base": a.base, "data.train": source, "data.validation": a.validation,
               "train.steps": a.steps, "train.seed": seed, "evaluate.every": a.steps}
    overrides = [*(f"{key}={value}" for key, value in changes.items()), *a.changes]
    adapt(load_config(CONFIG, overrides), a.workdir / f"{name}-{seed}")
    return load(a.workdir / f"{name}-{seed}")


def measure(lm: LanguageModel, strategy: str, base: LanguageModel, a: argparse.Namespace) -> dict[str, float]:
    """Quality and speed of the continuations of held-out beginnings."""
    prompts = beginnings_held_out(a)
    settings = Settings() if strategy == AR else Settings(unmasking=strategy)
    requests = [lm.continuation(prompt, a.max_tokens) for prompt in prompts]
    samples = lm.fill(requests, settings)
    alone = [lm.fill([request], settings)[0] for request in requests[:a.alone] for _ in range(3)]
    new = [sample.tokens[-sample.new_tokens:] for sample in samples]
    pairs = [pair for tokens in new for pair in zip(tokens, tokens[1:])]
    return {"nll": float(np.mean([nll(base, sample) for sample in samples])), "distinct": share_distinct(pairs),
            "per_forward": sum(s.new_tokens for s in samples) / sum(s.nfe for s in samples),
            "alone": sum(s.new_tokens for s in alone) / sum(s.cost.seconds for s in alone)}


def beginnings_held_out(a: argparse.Namespace) -> list[str]:
    """The first words of texts that are not trained on."""
    return [first_words(text) for text in documents(a.validation, held_out=True)[:a.prompts]]


def first_words(text: str, count: int = 8) -> str:
    """The beginning of a text, with its white space."""
    match = re.match(rf"(\s*\S+){{1,{count}}}", text)
    assert match is not None, "a text has words"
    return match[0]


def nll(base: LanguageModel, sample: Sample) -> float:
    """Nats per written token under the base."""
    tokens = jnp.minimum(jnp.asarray([sample.tokens]), base.config.vocab_size - 1)
    return float(jnp.mean(cross_entropy(base.logits(tokens)[:, :-1], tokens[:, 1:])[:, -sample.new_tokens:]))


def run_seed(seed: int, base: LanguageModel, a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """The figures of each way to decode, for one seed."""
    found = {AR: measure(base, AR, base, a)}
    # Jacobi iteration needs no conversion.
    iterations = [strategy for strategy in a.strategies.split(",") if strategy.startswith("jacobi")]
    found |= {f"the base, {strategy}": measure(base, strategy, base, a) for strategy in iterations}
    for name, source in (("text", str(a.text)), ("own text", own_text(base, a))):
        lm = converted(name.replace(" ", "_"), source, seed, a)
        for strategy in a.strategies.split(","):
            found[f"converted on {name}, {strategy}"] = measure(lm, strategy, base, a)
    for figures in found.values():
        figures["times"] = figures["alone"] / found[AR]["alone"]
    return found


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of what is converted, and of how it is measured."""
    parser.add_argument("--base", required=True)
    parser.add_argument("--text", required=True, help=f"a file, or {STDLIB}: the functions of the standard library")
    parser.add_argument("--validation", required=True, help="the same, of texts that are not trained on")
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=2316, help="texts whose beginnings the base continues")
    parser.add_argument("--own-tokens", type=int, default=120, help="of a continuation")
    parser.add_argument("--prompts", type=int, default=64, help="held-out beginnings")
    parser.add_argument("--alone", type=int, default=10, help="of these, continued alone, three times")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--changes", nargs="*", default=[], metavar="KEY=VALUE", help="to the config of a conversion")


def main() -> None:
    """Converts, decodes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--recipe", default="hybrid_shifted")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--strategies", default="threshold:0.9,threshold:0.7,speculate,speculate:4")
    a = parser.parse_args()
    a.workdir.mkdir(parents=True, exist_ok=True)
    base = load(a.base)
    seeds = [run_seed(seed, base, a) for seed in range(a.seeds)]
    (a.workdir / "own_text.json").write_text(json.dumps(seeds, indent=2) + "\n")
    print(f"{a.steps} steps of {a.recipe}, {a.seeds} seeds, {a.prompts} beginnings; {date.today()}, {processor()}, "
          f"Python {platform.python_version()}, jax {jax.__version__}")
    columns = {"nll": ("nats per token under the base", 3), "distinct": ("distinct bigrams", 3),
               "per_forward": ("tokens per forward", 2), "alone": ("tokens/s alone", 0), "times": ("x AR", 2)}
    print("| decoding | " + " | ".join(title for title, _ in columns.values()) + " |")
    print("|---" + "|---:" * len(columns) + "|")
    for way in seeds[0]:
        cells = []
        for key, (_, digits) in columns.items():
            values = np.array([seed[way][key] for seed in seeds])
            spread = f" ± {values.std(ddof=1):,.{digits}f}" if a.seeds > 1 else ""
            cells.append(f"{values.mean():,.{digits}f}{spread}")
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
