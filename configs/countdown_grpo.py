"""Countdown by reward: a diffusion model that was fine-tuned on the puzzles learns from which of its answers are right.

    dlm train --config countdown_grpo --workdir runs/grpo --config.model.base=MODEL \
        --config.data.train=data/puzzles --config.data.validation=data/puzzles

MODEL is a run of `hybrid_shifted` on pairs of `dlm prepare --pairs --end-tokens 16`; `benchmarks/reinforce.py` makes
both and runs this: from 72.7 % of new puzzles solved to 86.7 % in the first 100 steps, 1.66 to 1.90 tokens per forward
pass (the 260k-parameter stories LLaMA, three seeds, two cores of an Intel Xeon, jax 0.10.2, 2026-11-27;
docs/parallel_decoding.md).
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import tiny_stories_config


def get_config() -> ConfigDict:
    c = tiny_stories_config("hybrid_shifted", ar_weight=0.0)
    c.data.train = c.data.validation = "data/puzzles"
    c.data.validation_records = 64
    c.train.steps = 200
    c.train.global_batch_size = 256
    c.train.grad_accum_steps = 4
    c.optimizer.learning_rate = 1e-4
    c.optimizer.weight_decay = 0.0
    c.checkpoint.every = 50
    c.log.every = 5
    c.evaluate.every = 200
    c.reinforce.reward = "countdown"
    c.reinforce.group_size = 16
    c.reinforce.max_tokens = 32
    return c
