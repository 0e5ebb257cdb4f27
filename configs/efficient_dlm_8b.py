"""Qwen3-8B to a block diffusion model by Efficient-DLM's recipe (arXiv 2512.14067): block 64, 500B tokens.

`dlm_jax.config.shared.efficient_dlm_config` lists what the paper does not state, and what is used instead.

    dlm prepare --text 'fineweb/*.parquet' --model MODEL --length 4096 --out data/fineweb
    dlm train --config efficient_dlm_8b --workdir runs/efficient_dlm_8b --config.model.base=MODEL

Compiled but not run yet (`dlm aot --topology v5p:4x4x8`, or v6e:8x8; 2026-11-21; docs/pods.md): fits, with 17.76 GiB
of a v5p chip's 95, or 25.19 GiB of a v6e chip's 32, and a step takes at least 4.45 s on 128 or 64 chips, bound by
compute; on 8 H200, 81.95 GiB of 131 and 33 s.
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
