"""What committing several tokens at once costs: ways to select them, against one token per forward pass.

    python benchmarks/selection.py MODEL --base BASE --validation VALIDATION.jsonl

MODEL continues held-out beginnings with each selector. A text's quality is its negative log likelihood under the base;
the difference from the text of one token per pass is paired by beginning, with its standard error.
"""

import argparse
import platform
from datetime import date

import jax
import numpy as np
from own_text import beginnings_held_out, nll
from train_step import processor

from dlm_jax.language_model import LanguageModel, load
from dlm_jax.sampling.settings import Settings

ONE = "confidence"


def decode(lm: LanguageModel, base: LanguageModel, prompts: list[str], selector: str, max_tokens: int
           ) -> tuple[np.ndarray, float]:
    """Nats per token of each continuation under the base, and tokens per forward pass."""
    requests = [lm.continuation(prompt, max_tokens) for prompt in prompts]
    samples = lm.fill(requests, Settings(unmasking=selector))
    nats = np.array([nll(base, sample) for sample in samples])
    return nats, sum(sample.new_tokens for sample in samples) / sum(sample.nfe for sample in samples)


def main() -> None:
    """Decodes, and prints a row for each selector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--base", required=True)
    parser.add_argument("--validation", required=True, help="a file, or python-stdlib: functions that were held out")
    parser.add_argument("--selectors", default="threshold:0.9,threshold:0.8,factor:0.5,factor:1,frechet:0.5,frechet")
    parser.add_argument("--prompts", type=int, default=256, help="held-out beginnings")
    parser.add_argument("--max-tokens", type=int, default=64)
    a = parser.parse_args()
    lm, base = load(a.model), load(a.base)
    prompts = beginnings_held_out(a)
    print(f"{len(prompts)} beginnings; {date.today()}, {processor()}, Python {platform.python_version()}, jax "
          f"{jax.__version__}")
    print("| selector | nats per token under the base | more than one by one | tokens per forward |")
    print("|---|---:|---:|---:|")
    one, per_forward = decode(lm, base, prompts, ONE, a.max_tokens)
    print(f"| {ONE} | {one.mean():.3f} | | {per_forward:.2f} |", flush=True)
    for selector in a.selectors.split(","):
        nats, per_forward = decode(lm, base, prompts, selector, a.max_tokens)
        difference = nats - one
        error = difference.std(ddof=1) / len(prompts)**0.5
        print(f"| {selector} | {nats.mean():.3f} | {difference.mean():+.3f} ± {error:.3f} | {per_forward:.2f} |",
              flush=True)


if __name__ == "__main__":
    main()
