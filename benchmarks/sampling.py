"""Compares samplers on one machine with the same weights: ours with plain PyTorch loops of DiffuLLaMA's sampler and of
the block sampler of LLaDA and Fast-dLLM, and with AR decoding with a key-value cache in `transformers`.

    python benchmarks/sampling.py --base stories260k --curves runs/curves --figure docs/sampling.png

`--curves` is the work directory of `adapt_or_scratch.py`, with its adapted models: one stream, shifted; and two streams
with blocks. Our times exclude compilation. The load average is printed.
"""

import argparse
import collections
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import plain_samplers
import torch
import transformers
from train_step import alternate, processor, torch_model

import dlm_jax
from dlm_jax.attention.rules import Bidirectional
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.sampling.requests import Request
from dlm_jax.sampling.settings import Settings

PROMPT, CANVAS, STEPS, BLOCK = 8, 128, 32, 16
DIFFULLAMA = Settings(unmasking="diffullama_random", steps=STEPS, temperature=0.95, top_p=0.9)


def requests(prompts: Sequence[Sequence[int]], length: int = CANVAS) -> list[Request]:
    """Continuations to `length` tokens that no end token stops, so that all sides write equally many."""
    return [Request([*p, *[0] * (length - len(p))], [i >= len(p) for i in range(length)], False) for p in prompts]


def arrays(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for PyTorch: tokens and what is masked, [b, n]."""
    batch = requests(prompts)
    return torch.tensor([r.tokens for r in batch]), torch.tensor([r.masked for r in batch])


def against_diffullama(lm: LanguageModel, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, for the same number of steps."""
    model = torch_model(lm.config, lm.params)
    tokens, masked = arrays(prompts)

    def theirs() -> None:
        plain_samplers.diffullama(model, tokens, masked, lm.spec.mask_token_id, STEPS, DIFFULLAMA.temperature,
                                  DIFFULLAMA.top_p)

    return alternate({"ours": lambda: lm.fill(requests(prompts), DIFFULLAMA), "theirs": theirs}, rounds, 1)


def against_blocks(lm: LanguageModel, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; also reports how many of the texts agree, and each side's NFE."""
    model, settings = torch_model(lm.config, lm.params), Settings(unmasking="threshold:0.9")
    tokens, masked = arrays(prompts)
    ours = lm.fill(requests(prompts), settings)
    theirs, batch_nfe = plain_samplers.blocks(model, tokens, masked, lm.spec.mask_token_id, BLOCK, 0.9)
    same = sum(a.tokens == b for a, b in zip(ours, theirs.tolist()))
    print(f"block sampler: {same} of {len(prompts)} texts agree token for token; NFE of the batch: ours "
          f"{ours[0].cost.batch_nfe}, theirs {batch_nfe}", file=sys.stderr)
    return alternate({"ours": lambda: lm.fill(requests(prompts), settings), "theirs": lambda: plain_samplers.blocks(
        model, tokens, masked, lm.spec.mask_token_id, BLOCK, 0.9)}, rounds, 0)


def against_ar(base: LanguageModel, ar: Any, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, greedy, left to right."""
    return alternate({"ours": lambda: base.fill(requests(prompts), Settings()),
                      "theirs": lambda: decode_ar(ar, prompts, 0.0)}, rounds, 1)


def against_bare_forwards(lm: LanguageModel, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of our sampler (one stream, greedy), as it reports them, and of as many bare forward passes."""
    @jax.jit
    def forwards(params: Any, tokens: jax.Array) -> jax.Array:
        def one_forward(_: int, tokens: jax.Array) -> jax.Array:
            hidden = forward(params, tokens, config=lm.config, rule=Bidirectional(), segments=jnp.ones_like(tokens))
            logits = unembed(params, hidden, lm.config)
            return jnp.where(jnp.sum(logits) == 0.5, tokens + 1, tokens)  # so that XLA cannot remove a forward pass

        return jax.lax.fori_loop(0, STEPS, one_forward, tokens)

    tokens = jnp.asarray([r.tokens for r in requests(prompts)])
    forwards(lm.params, tokens).block_until_ready()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(3 * rounds):
        seconds["ours"].append(lm.fill(requests(prompts), Settings(steps=STEPS))[0].cost.seconds)
        start = time.perf_counter()
        forwards(lm.params, tokens).block_until_ready()
        seconds["theirs"].append(time.perf_counter() - start)
    return {side: float(np.median(found)) for side, found in seconds.items()}


def decode_ar(model: Any, prompts: list[list[int]], temperature: float) -> tuple[list[list[int]], float]:
    """Texts decoded left to right by `transformers` with its cache, and the seconds they took."""
    ids = torch.tensor(prompts)
    how = dict(do_sample=temperature > 0, **({"temperature": temperature, "top_k": 0} if temperature else {}))
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CANVAS - PROMPT,
                             min_new_tokens=CANVAS - PROMPT, pad_token_id=0, **how)
    return out.tolist(), time.perf_counter() - start


def quality(base: LanguageModel, texts: list[list[int]]) -> dict[str, float]:
    """AR NLL of the texts under the base model in nats per token, fraction of distinct bigrams, and entropy of the
    tokens in nats."""
    logits = jax.nn.log_softmax(base.logits(np.minimum(texts, base.config.vocab_size - 1)), -1)
    picked = jnp.take_along_axis(logits[:, PROMPT - 1:-1], jnp.asarray(texts)[:, PROMPT:, None], -1)
    new = [text[PROMPT:] for text in texts]
    pairs = [pair for text in new for pair in zip(text, text[1:])]
    entropies = []
    for text in new:
        counts = np.array(list(collections.Counter(text).values())) / len(text)
        entropies.append(-np.sum(counts * np.log(counts)))
    return {"nll": -float(jnp.mean(picked)), "distinct": len(set(pairs)) / len(pairs),
            "entropy": float(np.mean(entropies))}


def frontier(base: LanguageModel, one: LanguageModel, blocks: LanguageModel, ar: Any, prompts: list[list[int]]
             ) -> list[dict[str, Any]]:
    """Each sampler at temperature 0.9 and top-p 0.95: tokens per second, tokens per forward pass, and text quality."""
    rows = []
    ways = [("blocks, cached", blocks, {"unmasking": f"threshold:{tau}"}) for tau in (0.99, 0.9, 0.7, 0.5, 0.3)]
    ways += [("one stream, random order", one, {"unmasking": "diffullama_random", "steps": steps})
             for steps in (128, 64, 32, 16)]
    ways += [("one stream, confidence", one, {"unmasking": "confidence", "steps": steps}) for steps in (64, 32, 16)]
    ways += [("AR, ours", base, {})]
    for name, lm, how in ways:
        settings = Settings(temperature=0.9, top_p=0.95, **how)
        samples = lm.fill(requests(prompts), settings)
        per_forward = np.mean([sample.tokens_per_forward for sample in samples])
        steps = f", {how['steps']} steps" if "steps" in how else ""
        rows.append({"way": name, "setting": how.get("unmasking", "") + steps,
                     "speed": samples[0].cost.tokens_per_second, "per_forward": per_forward,
                     **quality(base, [sample.tokens for sample in samples])})
    texts, seconds = decode_ar(ar, prompts, 0.9)
    rows.append({"way": "AR, transformers", "setting": "cached", "speed": len(prompts) * (CANVAS - PROMPT) / seconds,
                 "per_forward": 1.0, **quality(base, texts)})
    return rows


def approximations(base: LanguageModel, one: LanguageModel, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What the caches of bidirectional models gain and change: greedy, 32 positions per block, one token per step."""
    rows: list[dict[str, Any]] = []
    exact: list[list[int]] = []
    for cache in ("none", "prefix", "dual"):
        settings = Settings(block=32, cache=cache)
        samples = one.fill(requests(prompts), settings)
        texts = [sample.tokens for sample in samples]
        exact = exact or texts
        same = np.mean([a == b for x, y in zip(texts, exact) for a, b in zip(x[PROMPT:], y[PROMPT:])])
        rows.append({"cache": cache, "seconds": samples[0].cost.seconds, "same": same, **quality(base, texts)})
    return rows


def draw(rows: list[dict[str, Any]], file: str) -> None:
    """Plots NLL against tokens per second and against tokens per forward pass."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, field, label in zip(axes, ("speed", "per_forward"), ("tokens per second", "tokens per forward pass")):
        for way in dict.fromkeys(row["way"] for row in rows):
            points = [row for row in rows if row["way"] == way]
            axis.plot([row[field] for row in points], [row["nll"] for row in points], "o-", label=way, markersize=5)
        axis.set_xlabel(label)
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("NLL under the base, nats per token")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("base", "curves", "prompts", "figure"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, nargs="+", default=(1, 16), help="batch sizes")
    a = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{date.today()} · {processor()}, {torch.get_num_threads()} thread(s) · Python {platform.python_version()}, "
          f"jax {jax.__version__}, torch {torch.__version__}, transformers {transformers.__version__} · fp32 · load "
          f"average before {os.getloadavg()[0]:.1f}")
    base, one, blocks = (dlm_jax.load(path) for path in (
        a.base, Path(a.curves) / "tiny_stories-base", Path(a.curves) / "tiny_stories_blocks-base"))
    ar = transformers.AutoModelForCausalLM.from_pretrained(a.base)
    lines = Path(a.prompts).read_text(encoding="utf-8").splitlines()
    prompts = [base.encode(json.loads(line)["text"])[:PROMPT] for line in lines[:max(a.batches)]]
    print("\n| batch | baseline | ours (s) | theirs (s) | theirs / ours |\n|---:|---|---:|---:|---:|")
    for batch_size in a.batches:
        batch = prompts[:batch_size]
        sides = {f"DiffuLLaMA loop, {STEPS} steps": against_diffullama(one, batch, a.rounds),
                 "block sampler without a cache, threshold 0.9": against_blocks(blocks, batch, a.rounds),
                 "AR in transformers, with a cache": against_ar(base, ar, batch, a.rounds),
                 f"our {STEPS} bare forward passes": against_bare_forwards(one, batch, a.rounds)}
        for name, seconds in sides.items():
            ours, theirs = seconds.values()
            print(f"| {batch_size} | {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} |", flush=True)
    print("\n| way | setting | tokens/s | tokens per forward | NLL | distinct-2 | entropy |")
    print("|---|---|---:|---:|---:|---:|---:|")
    rows = frontier(base, one, blocks, ar, prompts)
    for row in rows:
        print(f"| {row['way']} | {row['setting']} | {row['speed']:.0f} | {row['per_forward']:.2f} | {row['nll']:.2f} | "
              f"{row['distinct']:.2f} | {row['entropy']:.2f} |")
    draw(rows, a.figure)
    print("\n| cache | seconds | tokens equal to no cache | NLL |\n|---|---:|---:|---:|")
    for row in approximations(base, one, prompts):
        print(f"| {row['cache']} | {row['seconds']:.2f} | {row['same']:.0%} | {row['nll']:.2f} |")


if __name__ == "__main__":
    main()
