"""The autoregressive base that the package carries: a 1.4M-parameter LLaMA on the Python standard library's sources.

`launch/train_base.py` makes its tokenizer and starts it; `model.base` is given there.
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import recipe


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.recipe = ConfigDict(asdict(recipe("ar")))
    c.model = ConfigDict(dict(base="runs/base/seed", init="base", dtype="float32", remat="none"))
    c.data = ConfigDict(dict(train="python-stdlib", validation="python-stdlib", length=256, validation_records=128))
    # Two micro-batches of 8 x 256 tokens: what fits the cache of two cores best.
    c.train = ConfigDict(dict(steps=4500, batch=16, accumulate=2, seed=0))
    c.optimizer = ConfigDict(dict(learning_rate=3e-3, schedule="cosine", warmup=100, final=0.05, weight_decay=0.1))
    c.checkpoint = ConfigDict(dict(every=250, keep=2))
    c.log = ConfigDict(dict(every=25))
    c.evaluate = ConfigDict(dict(every=500, samples=1))
    return c
