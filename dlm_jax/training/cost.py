"""How many floating-point operations a training step takes, by formula: the compiler's own count sees the body of a
loop once and a kernel not at all."""

import math

from dlm_jax.attention.plan import visible_pairs
from dlm_jax.attention.rules import Bidirectional, BlockCausal, BlockDiffusion, Causal, Rule
from dlm_jax.diffusion.recipes import Recipe
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import weight_table


def step_flops(model: ModelConfig, recipe: Recipe, batch: int, length: int) -> float:
    """Operations of one step on `batch` records of `length` tokens, each one document: two for a weight and token, four
    head_dim for a head and visible pair, and twice as many backward. What is made again (remat) does not count.

    The head works on the tokens of the text, once a loss; the layers on both streams. Schedules count as already over,
    and the pass of a frozen base does not count.
    """
    sizes = {path: math.prod(w.shape) for path, w in weight_table(model).items() if w.decays}
    sizes.pop("embed.positions", None)
    head = sizes.pop("embed.tokens")
    head = sizes.pop("head.weight", head)
    rule: Rule = Causal() if recipe.corruption == "none" else Bidirectional()
    if recipe.block_size:
        rule = BlockCausal(recipe.block_size)
    if recipe.streams == 2:
        rule = BlockDiffusion(length, recipe.block_size, recipe.clean_half)
    pairs = float(visible_pairs(rule, recipe.streams * length)[0])
    losses, views = 1 + (recipe.ar_weight > 0), 1 + recipe.complementary
    forward = (2 * length * (recipe.streams * sum(sizes.values()) + losses * head)
               + 4 * model.head_dim * model.heads * model.depth * pairs)
    return 3.0 * batch * views * forward
