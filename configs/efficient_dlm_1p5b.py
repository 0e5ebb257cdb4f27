"""Qwen2.5-1.5B to a block diffusion model by Efficient-DLM's recipe (arXiv 2512.14067).

Two streams, block 16, lambda 0.1, 300B tokens; learning rate 1e-5 to 3e-6. The paper does not say how long its
records were, how many went into a step, or how the rate warmed up: 512 of 4,096 tokens and 1 % are what its authors'
other recipes have. Nor does it name its data exactly; FineWeb stands here for any mixture.

    dlm prepare --text 'fineweb/*.parquet' --model MODEL --length 4096 --out data/fineweb
    dlm train --config configs/efficient_dlm_1p5b.py --workdir runs/efficient_dlm_1p5b --config.model.base=MODEL

One GPU, or a smaller Qwen2.5 as MODEL: --config.train.batch=32 --config.train.accumulate=32 --config.data.length=1024.

Memory and least time of a step on its target are in docs/pods.md, by `dlm aot --config configs/efficient_dlm_1p5b.py
--topology v5e:4x8`.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import recipe


def get_config() -> ConfigDict:
    c = ConfigDict()

    c.recipe = ConfigDict(asdict(recipe("efficient_dlm")))

    c.model = ConfigDict()
    c.model.base = "Qwen/Qwen2.5-1.5B"
    c.model.init = "base"
    c.model.mask = "new"
    c.model.dtype = "bfloat16"
    c.model.remat = "full"

    c.data = ConfigDict()
    c.data.train = "data/fineweb"
    c.data.validation = "data/fineweb_validation"
    c.data.length = 4096
    c.data.validation_records = 256

    c.train = ConfigDict()
    c.train.steps = 143_000
    c.train.batch = 512
    c.train.accumulate = 16  # a record a chip at a time on 32 chips
    c.train.seed = 0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 1e-5
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 1430
    c.optimizer.final = 0.3
    c.optimizer.beta2 = 0.95
    c.optimizer.weight_decay = 0.1

    c.checkpoint = ConfigDict(dict(every=500, keep=2))
    c.log = ConfigDict(dict(every=10))
    c.evaluate = ConfigDict(dict(every=1000, samples=1))
    return c
