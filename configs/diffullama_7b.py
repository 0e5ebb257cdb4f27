"""LLaMA-2 7B to a diffusion model: DiffuLLaMA (arXiv 2410.17891, table 4 and appendix B), with annealing.

65B tokens of SlimPajama and StarCoder in records of 2,048 tokens; one stream, shifted. The authors took some 31M tokens
a step, by their scripts, and no annealing at this size, because their kernel could not mask it; here a step has 4.2M
tokens and the causal mask opens over the first 1,000 steps.

    dlm prepare --text 'slimpajama/*.jsonl.zst' --model MODEL --length 2048 --out data/slimpajama
    dlm prepare --text 'starcoder/*.parquet' --model MODEL --length 2048 --out data/starcoder
    dlm train --config configs/diffullama_7b.py --workdir runs/diffullama_7b --config.model.base=MODEL

Memory and least time of a step on its targets are in docs/pods.md, by `dlm aot --config configs/diffullama_7b.py
--topology v5e:4x8` (or v5p:4x4x4, v6e:4x8).
"""

from dataclasses import asdict, replace

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import recipe


def get_config() -> ConfigDict:
    c = ConfigDict()

    c.recipe = ConfigDict(asdict(replace(recipe("diffullama"), anneal_steps=1000)))

    c.model = ConfigDict()
    c.model.base = "meta-llama/Llama-2-7b-hf"
    c.model.init = "base"
    c.model.mask = "new"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data = ConfigDict()
    c.data.train = "data/slimpajama:0.69,data/starcoder:0.31"
    c.data.validation = "data/validation"
    c.data.length = 2048
    c.data.validation_records = 256

    c.train = ConfigDict()
    c.train.steps = 15_500
    c.train.batch = 2048
    c.train.accumulate = 32  # 2 records a chip at a time on 32 chips
    c.train.seed = 0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 2e-5
    c.optimizer.schedule = "constant"
    c.optimizer.warmup = 0
    c.optimizer.beta2 = 0.95
    c.optimizer.weight_decay = 0.1

    c.checkpoint = ConfigDict(dict(every=250, keep=2))
    c.log = ConfigDict(dict(every=10))
    c.evaluate = ConfigDict(dict(every=250, samples=1))
    return c
