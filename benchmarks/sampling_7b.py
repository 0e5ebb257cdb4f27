"""Speedup from the block cache and from thresholds at 7B, with random weights, on one GPU or TPU.

    python benchmarks/sampling_7b.py [--shape meta-llama/Llama-2-7b-hf] [--length 512] [--batch 1]

One block-causal model (blocks of 32, bf16) continues 8 tokens to the length: one token per forward pass, recomputing
the whole canvas each time; the same with the block cache; and with thresholds. Random weights are confident of nothing,
so the thresholds are quantiles of the first run's confidences: they commit several tokens per forward pass, as a
trained model does at 0.9. Without an accelerator it reports that and stops; to try it on a CPU, add --shape gpt2
--length 64 --anywhere.
"""

import argparse
import statistics
from datetime import date

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.language_model import LanguageModel
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.shapes import SHAPES
from dlm_jax.models.weights import init
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings

PROMPT, BLOCK, ROUNDS, TARGET = 8, 32, 3, 4.0


def random_model(shape: str) -> LanguageModel:
    """Weights in bf16; the last token of the vocabulary is the mask."""
    config = SHAPES[shape]
    params = jax.jit(lambda key: init(config, key, jnp.bfloat16))(jax.random.key(0))
    spec = DiffusionSpec("same_position", "block_causal", BLOCK, config.vocab_size - 1)
    return LanguageModel(config, params, spec, None)


def timed(lm: LanguageModel, requests: list[Request], rounds: int, **how: str) -> tuple[float, list[Sample]]:
    """Median seconds of a batch, without compilation, and its samples."""
    runs = [lm.fill(requests, Settings(**how)) for _ in range(rounds)]  # type: ignore[arg-type]
    return statistics.median(samples[0].cost.seconds for samples in runs), runs[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="meta-llama/Llama-2-7b-hf")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--anywhere", action="store_true", help="run on a CPU too")
    a = parser.parse_args()
    device = jax.devices()[0]
    if device.platform == "cpu" and not a.anywhere:
        print("no accelerator found: nothing is measured")
        return
    print(f"{date.today()} · {device.device_kind} · jax {jax.__version__} · {a.shape}, {a.batch} x {a.length} tokens, "
          f"blocks of {BLOCK}, bf16, medians of {a.rounds}\n")
    lm = random_model(a.shape)
    prompts = np.random.default_rng(0).integers(0, lm.config.vocab_size - 1, (a.batch, PROMPT))
    masked = [i >= PROMPT for i in range(a.length)]
    requests = [Request([*map(int, prompt), *[0] * (a.length - PROMPT)], masked, False) for prompt in prompts]
    slow, samples = timed(lm, requests, a.rounds, unmasking="threshold:1", cache="none")
    confidences = [p for sample in samples for p in sample.confidence[PROMPT:]]
    ways = {"whole canvas, one token per forward": (slow, samples)}
    for name, quantile in (("one token per forward", 1.0), ("threshold", 0.5), ("lower threshold", 0.1)):
        tau = 1.0 if quantile == 1 else float(np.quantile(confidences, quantile))
        ways[f"block cache, {name} {tau:.2g}"] = timed(lm, requests, a.rounds, unmasking=f"threshold:{tau}")
    print("| way | seconds | tokens per forward | speedup |\n|---|---:|---:|---:|")
    for name, (seconds, samples) in ways.items():
        per_forward = np.mean([sample.tokens_per_forward for sample in samples])
        print(f"| {name} | {seconds:.3f} | {per_forward:.2f} | {slow / seconds:.2f} |")
    print(f"\nThe target is a speedup of {TARGET} with a threshold over the whole canvas.")


if __name__ == "__main__":
    main()
