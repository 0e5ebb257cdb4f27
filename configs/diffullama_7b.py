"""LLaMA-2 7B to a diffusion model: DiffuLLaMA (arXiv 2410.17891, table 4 and appendix B), with annealing.

65B tokens of SlimPajama and StarCoder in records of 2,048 tokens; one stream, shifted. By their scripts, the authors
used about 31M tokens per step, and no annealing at this size, because their kernel could not mask it. Here a step has
4.2M tokens and the causal mask opens over the first 1,000 steps.

    dlm prepare --text 'slimpajama/*.jsonl.zst' --model MODEL --length 2048 --out data/slimpajama
    dlm prepare --text 'starcoder/*.parquet' --model MODEL --length 2048 --out data/starcoder
    dlm train --config diffullama_7b --workdir runs/diffullama_7b --config.model.base=MODEL

Compiled but not run yet (`dlm aot`, 2026-11-30; docs/pods.md). It fits everywhere; peak memory of a device, and the
time of a step by the compiler's schedule, on GPUs at least:

    v5e:4x8    14.51 GiB of 16   45.6 s    as it is
    v5p:4x4x4  29.83 GiB of 95    8.6 s    model.remat=save_projections, train.grad_accum_steps=8
    v6e:4x8    19.97 GiB of 32   10.7 s    model.remat=save_projections
    h100:8     44.32 GiB of 75   25.8 s    as it is
    h200:8     65.56 GiB of 131  22.7 s    model.remat=save_projections
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import base_config


def get_config() -> ConfigDict:
    c = base_config("diffullama", anneal_steps=1000)
    c.model.base = "meta-llama/Llama-2-7b-hf"
    c.model.dtype = "bfloat16"
    c.model.remat = "save_qkv"  # 16 GiB hold it; with more memory 'save_projections' is faster (docs/pods.md)

    c.data.train = "data/slimpajama:0.69,data/starcoder:0.31"
    c.data.validation = "data/validation"
    c.data.seq_length = 2048
    c.data.validation_records = 256

    c.train.steps = 15_500
    c.train.global_batch_size = 2048
    c.train.grad_accum_steps = 32  # 2 records per chip at a time, on 32 chips
    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "constant"

    c.checkpoint.every = 250
    c.log.every = 10
    c.evaluate.every = 250
    return c
