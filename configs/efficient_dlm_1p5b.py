"""Qwen2.5-1.5B to a block diffusion model by Efficient-DLM's recipe (arXiv 2512.14067): block 16, 300B tokens.

`dlm_jax.config.shared.efficient_dlm_config` lists what the paper does not state, and what is used instead.

    dlm prepare --text 'fineweb/*.parquet' --model MODEL --length 4096 --out data/fineweb
    dlm train --config efficient_dlm_1p5b --workdir runs/efficient_dlm_1p5b --config.model.base=MODEL

For one GPU, or a smaller Qwen2.5 as MODEL, add --config.train.global_batch_size=32 --config.train.grad_accum_steps=32
--config.data.seq_length=1024.

Compiled but not run yet (`dlm aot --topology v5e:4x8`, 2026-11-30; docs/pods.md): fits, with 8.76 GiB of a chip's 16,
and a step takes 11.4 s on 32 chips by the compiler's schedule; on 8 H200, 19.38 GiB of 131 and at least 5.92 s.
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import efficient_dlm_config


def get_config() -> ConfigDict:
    c = efficient_dlm_config(block_size=16)
    c.model.base = "Qwen/Qwen2.5-1.5B"
    c.train.steps = 143_000  # 300B tokens
    c.train.grad_accum_steps = 16  # one record per chip at a time, on 32 chips
    c.optimizer.warmup_steps = 1430
    return c
