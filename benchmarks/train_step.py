"""A training step of dlm-jax against the same step in plain PyTorch, on this machine's CPU.

    python benchmarks/train_step.py [--pairs 15]

The sides alternate step by step; the table gives medians. Both compute the same loss from the same weights, tokens and
noise, which is checked before anything is timed. dlm-jax splits the batch into 4 micro-batches
(`train.grad_accum_steps`), which changes only the speed; PyTorch is credited with the better of 1 and 4. Run it on a
quiet machine: when other work shares the cores, PyTorch's threads wait for each other and the comparison flatters
dlm-jax (prefix the command with `taskset -c 0` to give each side one thread, which is more robust on a busy machine).
The load average is printed.
"""

import argparse
import dataclasses
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from plain_torch import Llama, Trainer

from dlm_jax.attention.visibility import training_rule
from dlm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelSource,
    OptimizerConfig,
    TrainConfig,
)
from dlm_jax.diffusion.noise import NoisyBatch
from dlm_jax.diffusion.recipes import Recipe, recipe
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.weights import Params, init
from dlm_jax.objective.loss import loss_sums
from dlm_jax.segments import find_documents
from dlm_jax.training.step import init_state, make_step

BATCH, LENGTH, MICRO_BATCHES, LEARNING_RATE = 32, 128, 4, 1e-3
LLAMA = dict(family="llama", max_length=LENGTH, rope=Rope(), norm="rms", norm_eps=1e-5, mlp="swiglu")
SHAPES = {
    "stories260k": ModelConfig(vocab_size=513, width=64, depth=5, heads=8, kv_heads=4, head_dim=8, mlp_width=172,
                               **LLAMA),
    "1.4M": ModelConfig(vocab_size=2049, width=128, depth=6, heads=4, kv_heads=2, head_dim=32, mlp_width=384, **LLAMA),
}
RECIPES = {
    "one stream": dataclasses.replace(recipe("diffullama"), anneal_steps=0),
    "two streams, block 16": recipe("bd3lm"),
}


def torch_model(c: ModelConfig, params: Params) -> Llama:
    """The PyTorch model, filled with our weights."""
    model = Llama(c.vocab_size, c.width, c.depth, c.heads, c.kv_heads, c.head_dim, c.mlp_width)
    layers = params["layers"]

    def fill(target: torch.Tensor, value: jax.Array) -> None:
        target.data.copy_(torch.from_numpy(np.array(value).reshape(target.shape)))

    fill(model.embed.weight, params["embed"]["tokens"])
    fill(model.norm.weight, params["final_norm"]["scale"])
    for i, block in enumerate(model.blocks):
        fill(block.norm1.weight, layers["attention_norm"]["scale"][i])
        fill(block.norm2.weight, layers["mlp_norm"]["scale"][i])
        for name in "qkv":
            weight = layers["attention"][name]["weight"][i]
            fill(getattr(block, name).weight, weight.reshape(c.width, -1).T)
        fill(block.o.weight, layers["attention"]["o"]["weight"][i].reshape(-1, c.width).T)
        for name in ("gate", "up", "down"):
            fill(getattr(block, name).weight, layers["mlp"][name]["weight"][i].T)
    return model


def check_same_loss(params: Params, c: ModelConfig, chosen: Recipe, trainer: Trainer, tokens: np.ndarray) -> None:
    """Asserts that both sides compute the same loss from the same weights, tokens [b, n] and noise."""
    masked, t = trainer.noise(*tokens.shape)
    with torch.no_grad():
        theirs = trainer.loss_sum(torch.from_numpy(tokens), masked, t).item()
    everywhere = np.ones(tokens.shape, bool)
    segments = jnp.ones(tokens.shape, jnp.int32)
    batch = NoisyBatch(tokens, segments, find_documents(tokens.shape[1], segments), everywhere, masked.numpy(),
                       t.numpy(), (masked / t).numpy(), np.zeros((len(tokens), 0), np.float32))
    rule = training_rule(chosen, tokens.shape[1])
    ours = jax.jit(lambda p, b: loss_sums(p, b, rule, trainer.mask_id, chosen, c).loss)(params, batch)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def our_step(params: Params, c: ModelConfig, chosen: Recipe, tokens: np.ndarray) -> Callable[[], None]:
    """A function that runs one training step on `tokens`, int [b, n], to completion."""
    batch, length = tokens.shape
    config = Config(chosen, ModelSource("none"), DataConfig("none", "none", length),
                    OptimizerConfig(LEARNING_RATE, "constant"), TrainConfig(1000, batch, MICRO_BATCHES),
                    CheckpointConfig(1), LogConfig(1), EvaluateConfig(1))
    step, state = make_step(config, c, c.vocab_size - 1), init_state(params, config, c)
    tokens, segments = jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32)

    def run() -> None:
        nonlocal state
        state, metrics = step(state, tokens, segments)
        jax.block_until_ready((state, metrics))

    return run


def alternate(sides: dict[str, Callable[[], None]], rounds: int, warm_up: int = 3) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, and the first `warm_up` rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(warm_up + rounds):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(c: ModelConfig, chosen: Recipe, pairs: int, batch: int = BATCH, length: int = LENGTH) -> dict[str, float]:
    """Median seconds per step of `ours`, `torch/1` and `torch/4` (PyTorch in 1 and in 4 micro-batches)."""
    params = init(c, jax.random.key(0))
    tokens = np.random.default_rng(0).integers(0, c.vocab_size - 1, (batch, length))
    sides = {"ours": our_step(params, c, chosen, tokens)}
    for micro_batches in (1, MICRO_BATCHES):
        trainer = Trainer(torch_model(c, params), c.vocab_size - 1, chosen.block_size, LEARNING_RATE, micro_batches)
        check_same_loss(params, c, chosen, trainer, tokens)
        sides[f"torch/{micro_batches}"] = lambda trainer=trainer: trainer.step(torch.from_numpy(tokens))
    return alternate(sides, pairs)


def processor() -> str:
    """The name of the CPU, where the system reports it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")] \
        if info.exists() else []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=15, help="timed steps of each side")
    parser.add_argument("--batch", type=int, default=BATCH, help="records per step, a multiple of 4")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens per record, a multiple of 16")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    a = parser.parse_args()
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    print(f"{date.today()} · {processor()}, {threads} thread(s) each · Python {platform.python_version()}, "
          f"jax {jax.__version__}, torch {torch.__version__} · fp32 · {a.batch} x {a.length} tokens · "
          f"medians of {a.pairs} · load average before {os.getloadavg()[0]:.1f}")
    print(f"`{' '.join(['python', *sys.argv])}`\n")
    print("| shape | objective | dlm-jax | PyTorch, 1 micro-batch | PyTorch, 4 micro-batches "
          "| dlm-jax / best PyTorch |")
    print("|---|---|---|---|---|---|")
    for shape in a.shapes:
        for objective, chosen in RECIPES.items():
            ours, *theirs = measure(SHAPES[shape], chosen, a.pairs, a.batch, a.length).values()
            cells = [f"{1000 * s:.0f} ms" for s in (ours, *theirs)]
            print(f"| {shape} | {objective} | {' | '.join(cells)} | {ours / min(theirs):.2f} |", flush=True)


if __name__ == "__main__":
    main()
