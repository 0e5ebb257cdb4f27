"""How many floating-point operations a training step takes, by formula: the compiler's own count sees the body of a
loop once and a kernel not at all."""

import math

from dlm_jax.attention.plan import visible_pairs
from dlm_jax.attention.rules import Bidirectional, BlockDiffusion, Causal, Rule
from dlm_jax.diffusion.recipes import Recipe
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import weight_table


def step_flops(model: ModelConfig, recipe: Recipe, batch: int, length: int) -> float:
    """Operations of one step on `batch` records of `length` tokens, each one document: two for a weight and token, four
    head_dim for a head and visible pair, and twice as many backward. What is made again (remat) does not count.

    The head works on the tokens of the text; the layers on both streams. Annealing counts as already over.
    """
    return 3.0 * batch * sum(forward_flops(model, recipe, length))


def remade_flops(model: ModelConfig, recipe: Recipe, batch: int, length: int, remat: str) -> float:
    """Operations of a step's backward pass that were done before: with `model.remat` 'dots' the attention, with 'full'
    all but the head."""
    matrices, head, pairs = forward_flops(model, recipe, length)
    return batch * {"none": 0.0, "dots": pairs, "full": matrices + pairs}[remat]


def forward_flops(model: ModelConfig, recipe: Recipe, length: int) -> tuple[float, float, float]:
    """Of one record, forward: in the layers' matrices, in the head, and for visible pairs."""
    sizes = {path: math.prod(w.shape) for path, w in weight_table(model).items() if w.decays}
    sizes.pop("embed.positions", None)
    head = sizes.pop("embed.tokens")
    head = sizes.pop("head.weight", head)
    rule: Rule = Causal() if recipe.corruption == "none" else Bidirectional()
    if recipe.streams == 2:
        rule = BlockDiffusion(length, recipe.block_size)
    pairs = float(visible_pairs(rule, recipe.streams * length)[0])
    return (2.0 * length * recipe.streams * sum(sizes.values()), 2.0 * length * head,
            4.0 * model.head_dim * model.heads * model.depth * pairs)
