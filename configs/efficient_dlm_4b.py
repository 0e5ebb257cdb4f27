"""Qwen3-4B to a block diffusion model by Efficient-DLM's recipe (arXiv 2512.14067): block 64, 300B tokens.

`dlm_jax.config.shared.efficient_dlm_config` lists what the paper does not state, and what is used instead.

    dlm prepare --text 'fineweb/*.parquet' --model MODEL --length 4096 --out data/fineweb
    dlm train --config efficient_dlm_4b --workdir runs/efficient_dlm_4b --config.model.base=MODEL

Compiled but not run yet (`dlm aot --topology v5p:4x4x4`, 2026-11-30; docs/pods.md): with model.remat=save_projections
it takes 47.20 GiB of a chip's 95, and a step 6.2 s on 64 chips by the compiler's schedule; on 8 H200 with
train.grad_accum_steps=32, 32.01 GiB of 131 and at least 16 s.
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import efficient_dlm_config


def get_config() -> ConfigDict:
    c = efficient_dlm_config(block_size=64)
    c.model.base = "Qwen/Qwen3-4B-Base"
    c.train.steps = 143_000  # 300B tokens
    c.train.grad_accum_steps = 4  # 2 records per chip at a time, on 64 chips
    c.optimizer.warmup_steps = 1430
    return c
