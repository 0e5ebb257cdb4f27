"""Qwen3-8B to a block diffusion model of 32,768 tokens: `efficient_dlm_8b`, with each record split over four chips.

    dlm prepare --text 'fineweb/*.parquet' --model MODEL --length 32768 --out data/fineweb_32k
    dlm train --config efficient_dlm_8b_long --workdir runs/efficient_dlm_8b_long --config.model.base=MODEL

The number of steps is ours. Compiled but not run yet (`dlm aot --topology v5p:4x4x4`, 2026-11-30; docs/pods.md): it
takes 66.5 GiB of a chip's 95, and a step 14.9 s on 64 chips by the compiler's schedule; on 64 of v6e with
model.remat=save_attention, mesh.context=8 and train.grad_accum_steps=8, 20.80 GiB of 32 and 12.6 s.
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import efficient_dlm_config


def get_config() -> ConfigDict:
    c = efficient_dlm_config(block_size=64)
    c.model.base = "Qwen/Qwen3-8B-Base"
    c.model.remat = "save_projections"
    c.data.train = "data/fineweb_32k"
    c.data.validation = "data/fineweb_32k_validation"
    c.data.seq_length = 32_768
    c.data.validation_records = 32
    c.train.steps = 10_000  # 21B tokens
    c.train.global_batch_size = 64
    c.train.grad_accum_steps = 4  # one record per four chips at a time, on 64 chips
    c.mesh.context = 4
    c.optimizer.warmup_steps = 100
    return c
