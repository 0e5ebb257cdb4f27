"""Samplers on one machine, with the same weights: ours against plain PyTorch loops of DiffuLLaMA's sampler and of the
block sampler of LLaDA and Fast-dLLM, and against AR decoding with a key-value cache in `transformers`.

    python benchmarks/sampling.py --base stories260k --curves runs/curves --figure docs/sampling.png

`--curves` is the work directory of `adapt_or_scratch.py`, whose adapted models are read: one stream, shifted, and two
streams with blocks. Compilation is not timed on our side. The load average is printed.
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
DIFFULLAMA = Settings(order="diffullama_random", steps=STEPS, temperature=0.95, top_p=0.9)


def requests(prompts: Sequence[Sequence[int]], length: int = CANVAS) -> list[Request]:
    """Continuations to `length` tokens that no end token stops, so that all sides write as much."""
    return [Request([*p, *[0] * (length - len(p))], [i >= len(p) for i in range(length)], False) for p in prompts]


def arrays(prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for PyTorch: tokens and what is masked, [b, n]."""
    asked = requests(prompts)
    return torch.tensor([r.tokens for r in asked]), torch.tensor([r.masked for r in asked])


def against_diffullama(lm: LanguageModel, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, at equal steps."""
    model = torch_model(lm.config, lm.params)
    tokens, masked = arrays(prompts)

    def theirs() -> None:
        plain_samplers.diffullama(model, tokens, masked, lm.card.mask_token_id, STEPS, DIFFULLAMA.temperature,
                                  DIFFULLAMA.top_p)

    return alternate({"ours": lambda: lm.fill(requests(prompts), DIFFULLAMA), "theirs": theirs}, rounds, 1)


def against_blocks(lm: LanguageModel, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of each side; says how many of the texts are the same, and the passes."""
    model, settings = torch_model(lm.config, lm.params), Settings(order="threshold:0.9")
    tokens, masked = arrays(prompts)
    mine = lm.fill(requests(prompts), settings)
    text, passes = plain_samplers.blocks(model, tokens, masked, lm.card.mask_token_id, BLOCK, 0.9)
    same = sum(a.tokens == b for a, b in zip(mine, text.tolist()))
    print(f"block sampler: {same} of {len(prompts)} texts are the same token for token; {mine[0].batch.passes} passes, "
          f"theirs {passes}", file=sys.stderr)
    return alternate({"ours": lambda: lm.fill(requests(prompts), settings), "theirs": lambda: plain_samplers.blocks(
        model, tokens, masked, lm.card.mask_token_id, BLOCK, 0.9)}, rounds, 0)


def against_ar(base: LanguageModel, ar: Any, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, greedy, left to right."""
    return alternate({"ours": lambda: base.fill(requests(prompts), Settings()),
                      "theirs": lambda: decode_ar(ar, prompts, 0.0)}, rounds, 1)


def against_bare_passes(lm: LanguageModel, prompts: list[list[int]], rounds: int) -> dict[str, float]:
    """Median seconds of our loop (one stream, greedy), as it says itself, and of as many passes without one."""
    @jax.jit
    def passes(params: Any, tokens: jax.Array) -> jax.Array:
        def one(_: int, tokens: jax.Array) -> jax.Array:
            hidden = forward(params, tokens, config=lm.config, rule=Bidirectional(), segments=jnp.ones_like(tokens))
            logits = unembed(params, hidden, lm.config)
            return jnp.where(jnp.sum(logits) == 0.5, tokens + 1, tokens)  # so that no pass can be left out

        return jax.lax.fori_loop(0, STEPS, one, tokens)

    tokens = jnp.asarray([r.tokens for r in requests(prompts)])
    passes(lm.params, tokens).block_until_ready()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(3 * rounds):
        seconds["ours"].append(lm.fill(requests(prompts), Settings(steps=STEPS))[0].batch.seconds)
        start = time.perf_counter()
        passes(lm.params, tokens).block_until_ready()
        seconds["theirs"].append(time.perf_counter() - start)
    return {side: float(np.median(found)) for side, found in seconds.items()}


def decode_ar(model: Any, prompts: list[list[int]], temperature: float) -> tuple[list[list[int]], float]:
    """Texts of `transformers`, left to right with its cache, and the seconds they took."""
    ids = torch.tensor(prompts)
    how = dict(do_sample=temperature > 0, **({"temperature": temperature, "top_k": 0} if temperature else {}))
    start = time.perf_counter()
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=CANVAS - PROMPT,
                             min_new_tokens=CANVAS - PROMPT, pad_token_id=0, **how)
    return out.tolist(), time.perf_counter() - start


def quality(base: LanguageModel, texts: list[list[int]]) -> dict[str, float]:
    """AR NLL of the texts under the base model in nats a token, distinct bigrams, and entropy of the tokens in nats."""
    logits = jax.nn.log_softmax(base.logits(np.minimum(texts, base.config.vocab_size - 1)), -1)
    picked = jnp.take_along_axis(logits[:, PROMPT - 1:-1], jnp.asarray(texts)[:, PROMPT:, None], -1)
    new = [text[PROMPT:] for text in texts]
    pairs = [pair for text in new for pair in zip(text, text[1:])]
    each = []
    for text in new:
        counts = np.array(list(collections.Counter(text).values())) / len(text)
        each.append(-np.sum(counts * np.log(counts)))
    return {"nll": -float(jnp.mean(picked)), "distinct": len(set(pairs)) / len(pairs), "entropy": float(np.mean(each))}


def frontier(base: LanguageModel, one: LanguageModel, blocks: LanguageModel, ar: Any, prompts: list[list[int]]
             ) -> list[dict[str, Any]]:
    """Each way, at temperature 0.9 and top-p 0.95: tokens a second, tokens a pass, and the quality of the texts."""
    rows = []
    ways = [("blocks, cached", blocks, {"order": f"threshold:{tau}"}) for tau in (0.99, 0.9, 0.7, 0.5, 0.3)]
    ways += [("one stream, random order", one, {"order": "random", "steps": steps}) for steps in (128, 64, 32, 16)]
    ways += [("one stream, confidence", one, {"order": "confidence", "steps": steps}) for steps in (64, 32, 16)]
    ways += [("AR, ours", base, {})]
    for name, lm, how in ways:
        settings = Settings(temperature=0.9, top_p=0.95, **how)
        samples = lm.fill(requests(prompts), settings)
        per_pass = np.mean([sample.tokens_per_forward for sample in samples])
        steps = f", {how['steps']} steps" if "steps" in how else ""
        rows.append({"way": name, "setting": how.get("order", "") + steps,
                     "speed": samples[0].batch.tokens_per_second, "per_pass": per_pass,
                     **quality(base, [sample.tokens for sample in samples])})
    texts, seconds = decode_ar(ar, prompts, 0.9)
    rows.append({"way": "AR, transformers", "setting": "cached", "speed": len(prompts) * (CANVAS - PROMPT) / seconds,
                 "per_pass": 1.0, **quality(base, texts)})
    return rows


def approximations(base: LanguageModel, one: LanguageModel, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """What the caches of bidirectional models gain and change: greedy, 32 places a block, one token a step."""
    rows: list[dict[str, Any]] = []
    exact: list[list[int]] = []
    for cache in ("none", "prefix", "dual"):
        settings = Settings(block=32, cache=cache)
        samples = one.fill(requests(prompts), settings)
        texts = [sample.tokens for sample in samples]
        exact = exact or texts
        same = np.mean([a == b for x, y in zip(texts, exact) for a, b in zip(x[PROMPT:], y[PROMPT:])])
        rows.append({"cache": cache, "seconds": samples[0].batch.seconds, "same": same, **quality(base, texts)})
    return rows


def draw(rows: list[dict[str, Any]], file: str) -> None:
    """NLL against tokens a second and against tokens a pass."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, field, label in zip(axes, ("speed", "per_pass"), ("tokens a second", "tokens a pass")):
        for way in dict.fromkeys(row["way"] for row in rows):
            mine = [row for row in rows if row["way"] == way]
            axis.plot([row[field] for row in mine], [row["nll"] for row in mine], "o-", label=way, markersize=5)
        axis.set_xlabel(label)
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("NLL under the base, nats a token")
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("base", "curves", "prompts", "figure"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--rounds", type=int, default=5)
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
    prompts = [base.encode(json.loads(line)["text"])[:PROMPT] for line in lines[:16]]
    print("\n| batch | yardstick | ours (s) | theirs (s) | theirs / ours |\n|---:|---|---:|---:|---:|")
    for batch in (1, 16):
        some = prompts[:batch]
        sides = {f"DiffuLLaMA loop, {STEPS} steps": against_diffullama(one, some, a.rounds),
                 "block sampler without a cache, threshold 0.9": against_blocks(blocks, some, a.rounds),
                 "AR in transformers, with a cache": against_ar(base, ar, some, a.rounds),
                 f"{STEPS} bare passes of ours": against_bare_passes(one, some, a.rounds)}
        for name, seconds in sides.items():
            ours, theirs = seconds.values()
            print(f"| {batch} | {name} | {ours:.3f} | {theirs:.3f} | {theirs / ours:.2f} |", flush=True)
    print("\n| way | setting | tokens/s | tokens a pass | NLL | distinct-2 | entropy |")
    print("|---|---|---:|---:|---:|---:|---:|")
    rows = frontier(base, one, blocks, ar, prompts)
    for row in rows:
        print(f"| {row['way']} | {row['setting']} | {row['speed']:.0f} | {row['per_pass']:.2f} | {row['nll']:.2f} | "
              f"{row['distinct']:.2f} | {row['entropy']:.2f} |")
    draw(rows, a.figure)
    print("\n| cache | seconds | tokens as without a cache | NLL |\n|---|---:|---:|---:|")
    for row in approximations(base, one, prompts):
        print(f"| {row['cache']} | {row['seconds']:.2f} | {row['same']:.0%} | {row['nll']:.2f} |")


if __name__ == "__main__":
    main()
