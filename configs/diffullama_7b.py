"""LLaMA-2 7B to a diffusion model: DiffuLLaMA (arXiv 2410.17891, table 4 and appendix B), with annealing.

65B tokens of SlimPajama and StarCoder in records of 2,048 tokens; one stream, shifted. By their scripts, the authors
used about 31M tokens per step, and no annealing at this size, because their kernel could not mask it. Here a step has
4.2M tokens and the causal mask opens over the first 1,000 steps.

    dlm prepare --text 'slimpajama/*.jsonl.zst' --model MODEL --length 2048 --out data/slimpajama
    dlm prepare --text 'starcoder/*.parquet' --model MODEL --length 2048 --out data/starcoder
    dlm train --config diffullama_7b --workdir runs/diffullama_7b --config.model.base=MODEL

Compiled but not run yet (`dlm aot --topology v5e:4x8`, 2026-11-21; docs/pods.md). It fits everywhere, bound by compute;
peak memory of a device and the least time of a step:

    v5e:4x8    10.48 GiB of 16   37.9 s        h100:8   24.23 GiB of 75    30.2 s
    v5p:4x4x4   5.56 GiB of 95    8.12 s       h200:8   24.20 GiB of 131   30.2 s
    v6e:4x8    10.32 GiB of 32    8.12 s
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
