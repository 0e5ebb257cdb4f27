"""Qwen3-8B to a block diffusion model by Efficient-DLM's recipe (arXiv 2512.14067): block 64, 500B tokens.

`dlm_jax.config.shared.efficient_dlm_config` lists what the paper does not state, and what is used instead.

    dlm prepare --text 'fineweb/*.parquet' --model MODEL --length 4096 --out data/fineweb
    dlm train --config efficient_dlm_8b --workdir runs/efficient_dlm_8b --config.model.base=MODEL

Compiled but not run yet (`dlm aot`, 2026-11-30; docs/pods.md): on 128 v5p chips with model.remat=save_projections it
takes 40.24 GiB of 95 and 5.3 s a step by the compiler's schedule; on 64 of v6e with train.grad_accum_steps=8, 28.10 GiB
of 32 and 7.5 s; on 8 H200 with train.grad_accum_steps=32, 48.12 GiB of 131 and at least 28.9 s.
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import efficient_dlm_config


def get_config() -> ConfigDict:
    c = efficient_dlm_config(block_size=64)
    c.model.base = "Qwen/Qwen3-8B-Base"
    c.train.steps = 238_000  # 500B tokens
    c.train.grad_accum_steps = 4  # one record per chip at a time, on 128 chips
    c.optimizer.warmup_steps = 2380
    return c
