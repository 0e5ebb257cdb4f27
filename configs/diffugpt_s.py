"""GPT-2 small to a diffusion model: DiffuGPT-S (arXiv 2410.17891, table 4 and appendix B.2).

131B tokens of FineWeb in records of 512 tokens; one stream, shifted; the causal mask opens over 10,000 steps.

    dlm prepare --text 'fineweb/*.parquet' --model gpt2 --length 512 --out data/fineweb
    dlm train --config configs/diffugpt_s.py --workdir runs/diffugpt_s --config.model.base=MODEL

Memory and least time of a step on its target are in docs/pods.md, by `dlm aot --config configs/diffugpt_s.py
--topology v5e:2x4`.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import recipe


def get_config() -> ConfigDict:
    c = ConfigDict()

    c.recipe = ConfigDict(asdict(recipe("diffullama")))  # anneals over 10,000 steps

    c.model = ConfigDict()
    c.model.base = "gpt2"
    c.model.init = "base"
    c.model.mask = "new"
    c.model.dtype = "bfloat16"
    c.model.remat = "none"

    c.data = ConfigDict()
    c.data.train = "data/fineweb"
    c.data.validation = "data/fineweb_validation"
    c.data.length = 512
    c.data.validation_records = 1024

    c.train = ConfigDict()
    c.train.steps = 1_000_000
    c.train.batch = 256
    c.train.accumulate = 2
    c.train.seed = 0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 3e-4
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 2000
    c.optimizer.final = 0.0
    c.optimizer.beta2 = 0.999  # the authors ran the defaults of Hugging Face's Trainer
    c.optimizer.weight_decay = 0.0

    c.checkpoint = ConfigDict(dict(every=2000, keep=2))
    c.log = ConfigDict(dict(every=50))
    c.evaluate = ConfigDict(dict(every=5000, samples=1))
    return c
