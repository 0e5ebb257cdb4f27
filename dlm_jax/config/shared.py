"""What several files of `configs/` share: each starts from one of these and states what is particular to it."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from dlm_jax.config.fields import Config
from dlm_jax.diffusion.recipes import recipe


def base_config(recipe_name: str, **changes: Any) -> ConfigDict:
    """A config of a named recipe with these keys changed; its other groups are empty. Keys that stay unset have the
    defaults of `dlm_jax.config.fields`."""
    c = ConfigDict({group.name: ConfigDict() for group in dataclasses.fields(Config)})
    c.recipe = ConfigDict(dataclasses.asdict(dataclasses.replace(recipe(recipe_name), **changes)))
    return c


def diffugpt_config() -> ConfigDict:
    """DiffuGPT-S and -M: GPT-2 on FineWeb (arXiv 2410.17891, table 4 and appendix B.2)."""
    c = base_config("diffullama")  # one stream, shifted; the causal mask opens over 10,000 steps
    c.model.dtype = "bfloat16"
    c.data.train = "data/fineweb"
    c.data.validation = "data/fineweb_validation"
    c.data.validation_records = 1024
    c.optimizer.learning_rate = 3e-4
    c.optimizer.warmup_steps = 2000
    c.optimizer.final_lr_ratio = 0.0
    c.optimizer.beta2 = 0.999  # the authors used the defaults of Hugging Face's Trainer
    c.optimizer.weight_decay = 0.0
    c.log.every = 50
    return c


def efficient_dlm_config(block_size: int) -> ConfigDict:
    """Qwen to a block diffusion model by Efficient-DLM's recipe (arXiv 2512.14067): two streams, lambda 0.1, learning
    rate 1e-5 to 3e-6.

    The paper does not state the length of its records, the batch size or the warmup: 512 records of 4,096 tokens and
    1 % are those of its authors' other recipes. Nor does it name its data exactly; FineWeb replaces its mixture.
    """
    c = base_config("efficient_dlm", block_size=block_size)
    c.model.dtype = "bfloat16"
    c.model.remat = "save_qkv"
    c.data.train = "data/fineweb"
    c.data.validation = "data/fineweb_validation"
    c.data.seq_length = 4096
    c.data.validation_records = 256
    c.train.global_batch_size = 512
    c.optimizer.learning_rate = 1e-5
    c.optimizer.final_lr_ratio = 0.3
    c.checkpoint.every = 500
    c.log.every = 10
    c.evaluate.every = 1000
    return c


def tiny_stories_config(recipe_name: str, **changes: Any) -> ConfigDict:
    """Any small base and text, adapted on a CPU within minutes: 500 steps of 32 x 128 tokens."""
    c = base_config(recipe_name, **changes)
    c.model.base = "bundled"
    c.data.train = "python-stdlib"
    c.data.validation = "python-stdlib"
    c.data.seq_length = 128
    c.data.validation_records = 256
    c.train.steps = 500
    c.train.global_batch_size = 32
    c.train.grad_accum_steps = 4  # micro-batches of 8 records fit the cache; the result is the same
    c.optimizer.learning_rate = 2e-3
    c.optimizer.warmup_steps = 20
    c.checkpoint.every = 100
    c.log.every = 10
    c.evaluate.every = 100
    c.evaluate.mc_samples = 4
    return c
