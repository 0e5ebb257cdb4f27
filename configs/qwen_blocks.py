"""Qwen2.5-0.5B (or -1.5B) to a block diffusion model by Efficient-DLM's recipe (arXiv 2512.14067).

Two streams, block 16, later tokens of a block masked more often, learning rate 1e-5 to 3e-6. Not yet run at this size.

    dlm train --config configs/qwen_blocks.py --workdir runs/qwen \
        --config.model.base=MODEL --config.data.train=PREPARED --config.data.validation=VALIDATION.jsonl
"""

from dataclasses import asdict

from ml_collections import ConfigDict

from dlm_jax.diffusion.recipes import recipe


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.recipe = ConfigDict(asdict(recipe("efficient_dlm")))
    c.model = ConfigDict(dict(base="models/qwen", init="base", mask="new", dtype="bfloat16", remat="full"))
    c.data = ConfigDict(dict(train="data/train", validation="held_out.jsonl", length=1024, validation_records=128))
    # One record of 1,024 tokens (2,048 in two streams) at a time: 32,768 tokens a step.
    c.train = ConfigDict(dict(steps=10_000, batch=32, accumulate=32, seed=0))
    c.optimizer = ConfigDict(dict(learning_rate=1e-5, schedule="cosine", warmup=100, final=0.3, weight_decay=0.1))
    c.checkpoint = ConfigDict(dict(every=500, keep=2))
    c.log = ConfigDict(dict(every=10))
    c.evaluate = ConfigDict(dict(every=500, samples=1))
    return c
