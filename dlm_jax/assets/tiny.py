"""The bundled base, adapted to a diffusion language model on a CPU: what `dlm demo` runs.

    dlm train --config configs/tiny.py --workdir runs/tiny
"""

from dataclasses import asdict, replace

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import recipe


def get_config() -> ConfigDict:
    c = ConfigDict()

    # One stream, shifted; the causal mask opens over the first steps.
    c.recipe = ConfigDict(asdict(replace(recipe("diffullama"), anneal_steps=60)))

    c.model = ConfigDict()
    c.model.base = "bundled"
    c.model.init = "base"
    c.model.mask = "new"
    c.model.dtype = "float32"
    c.model.remat = "none"

    c.data = ConfigDict()
    c.data.train = "python-stdlib"
    c.data.validation = "python-stdlib"
    c.data.length = 128
    c.data.validation_records = 64

    c.train = ConfigDict()
    c.train.steps = 500
    c.train.batch = 16
    c.train.accumulate = 2  # micro-batches of 8 x 128 tokens fit the cache; the result is the same
    c.train.seed = 0

    c.optimizer = ConfigDict()
    c.optimizer.learning_rate = 2e-3
    c.optimizer.schedule = "cosine"
    c.optimizer.warmup = 20
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip = 1.0

    c.checkpoint = ConfigDict(dict(every=250, keep=2))
    c.log = ConfigDict(dict(every=25))
    c.evaluate = ConfigDict(dict(every=250, samples=4))
    return c
