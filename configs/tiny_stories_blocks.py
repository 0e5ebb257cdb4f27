"""A given base and text, adapted on a CPU in minutes: two streams, block 16 (BD3-LM, Efficient-DLM).

    dlm train --config configs/tiny_stories_blocks.py --workdir runs/stories_blocks \
        --config.model.base=MODEL --config.data.train=TRAIN.jsonl --config.data.validation=VALIDATION.jsonl
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import recipe


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.recipe = ConfigDict(asdict(recipe("bd3lm")))
    c.model = ConfigDict(dict(base="bundled", init="base", mask="new", dtype="float32", remat="none"))
    c.data = ConfigDict(dict(train="python-stdlib", validation="python-stdlib", length=128, validation_records=256))
    # Four micro-batches of 8 records: the same result as one of 32, and it fits the cache.
    c.train = ConfigDict(dict(steps=500, batch=32, accumulate=4, seed=0))
    c.optimizer = ConfigDict(dict(learning_rate=2e-3, schedule="cosine", warmup=20, final=0.1, weight_decay=0.1))
    c.checkpoint = ConfigDict(dict(every=100, keep=2))
    c.log = ConfigDict(dict(every=10))
    c.evaluate = ConfigDict(dict(every=100, samples=4))
    return c
