"""Lines of data to JSON: a base fine-tuned left to right learns to write it many tokens at a time.

    dlm prepare --pairs pairs.jsonl --model MODEL --length 128 --end-tokens 16 --out data/pairs
    dlm train --config records --workdir runs/records \
        --config.model.base=MODEL --config.data.train=data/pairs --config.data.validation=data/pairs

MODEL already answers such pairs left to right (`--config.recipe=ar`). `dlm demo` and `benchmarks/frontier.py records`
run both, on contacts that they make (`dlm_jax/data/contacts.py`).

After 300 steps of 32 pairs a conversion writes 100 % of new lines exactly, with `speculate` 10.8 tokens per forward
pass, 3.0 times as fast as its base of 3.7M parameters alone, and 10.5 tokens, 1.5 times as fast, if the base is the
bundled one (three seeds, two cores of an AMD EPYC, jax 0.10.2, 2026-11-30; docs/parallel_decoding.md).
"""

from ml_collections import ConfigDict

from dlm_jax.config.shared import tiny_stories_config


def get_config() -> ConfigDict:
    c = tiny_stories_config("hybrid_shifted")
    c.data.train = c.data.validation = "data/pairs"
    c.data.validation_records = 64
    c.train.steps = 200
    c.train.global_batch_size = 16
    c.train.grad_accum_steps = 2
    c.checkpoint.every = 100
    c.log.every = 25
    c.evaluate.every = 200
    return c
