"""Floating-point operations of a training step, by formula: the compiler's own count sees the body of a loop only once
and a kernel not at all."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax

from dlm_jax.attention.plan import visible_pairs
from dlm_jax.attention.visibility import training_rule
from dlm_jax.config import Config
from dlm_jax.diffusion.recipes import Recipe
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.remat import PRODUCTS, recomputed
from dlm_jax.models.weights import weight_table
from dlm_jax.parallel.device_specs import device_spec


class ForwardFlops(NamedTuple):
    """Operations of a forward pass."""

    matrices: float  # in the layers' weights
    head: float
    attention: float  # for the visible pairs of a query and a key


def step_flops(model: ModelConfig, recipe: Recipe, batch: int, length: int) -> float:
    """Operations of one step on `batch` records of `length` tokens, each a single document.

    Forward: two per weight and token, and four head_dim per head and visible pair; backward: twice as many.
    Recomputation (remat) does not count. The head runs on the tokens of the text, once per loss; the layers run on
    both streams. Schedules count as finished, and the forward pass of a frozen teacher does not count.
    """
    return 3.0 * batch * sum(forward_flops(model, recipe, length))


def recompute_flops(model: ModelConfig, recipe: Recipe, batch: int, length: int, remat: str) -> float:
    """Operations of a step's backward pass that repeat the forward pass, with this `model.remat`."""
    flops, repeated = forward_flops(model, recipe, length), recomputed(remat)
    sizes = {path: math.prod(w.shape) for path, w in weight_table(model).items() if w.decays}
    products = [f"layers.{product}.weight" for name in repeated for product in PRODUCTS[name]]
    share = sum(sizes.get(path, 0) for path in products) / sum(
        size for path, size in sizes.items() if path.startswith("layers."))
    return batch * (share * flops.matrices + ("attention" in repeated) * flops.attention)


def forward_flops(model: ModelConfig, recipe: Recipe, length: int) -> ForwardFlops:
    """Operations of the forward pass of one record."""
    sizes = {path: math.prod(w.shape) for path, w in weight_table(model).items() if w.decays}
    sizes.pop("embed.positions", None)
    embedding = sizes.pop("embed.tokens")
    head = sizes.pop("head.weight", embedding)
    visible = float(visible_pairs(training_rule(recipe, length), recipe.streams * length)[0])
    losses = 2 if recipe.ar_weight > 0 else 1
    views = 2 if recipe.complementary else 1
    return ForwardFlops(matrices=views * 2.0 * length * recipe.streams * sum(sizes.values()),
                        head=views * 2.0 * length * losses * head,
                        attention=views * 4.0 * model.head_dim * model.heads * model.depth * visible)


def throughput(config: Config, model: ModelConfig, length: int) -> Callable[[float], dict[str, float]]:
    """A function from seconds per step to `tokens_per_second` and, if the devices' peak is known, `mfu`.

    MFU (model FLOPs utilization) is `step_flops`, which counts visible pairs only and no recomputation, over what all
    devices could do in that time.
    """
    batch = config.train.global_batch_size
    flops = step_flops(model, config.recipe, batch, length)
    spec = device_spec(jax.devices()[0].device_kind)

    def per_second(seconds_per_step: float) -> dict[str, float]:
        rates = {"tokens_per_second": batch * length / seconds_per_step}
        if spec is not None:
            rates["mfu"] = flops / seconds_per_step / (spec.flops * jax.device_count())
        return rates

    return per_second
