"""The single place that decides which mask rule a model uses, both in training and when it denoises.

The rules themselves, that of two streams included (`BlockDiffusion`), are in `rules.py`. The loss, the FLOP count, the
likelihood, `LanguageModel.logits` and the sampler all ask here.
"""

import jax
import jax.numpy as jnp

from dlm_jax.attention.rules import (
    Annealed,
    Bidirectional,
    BlockCausal,
    BlockDiffusion,
    Causal,
    CausalThenBlocks,
    CausalThenLastBlock,
    LookAhead,
    Rule,
)
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.diffusion.schedule import linear_ramp
from dlm_jax.hashing import hash32
from dlm_jax.typing import Int, shape_checked


@shape_checked
def training_rule(recipe: Recipe, length: int, step: Int[jax.Array, ""] | None = None, seed: int = 0) -> Rule:
    """The rule that `recipe` trains under, for records of `length` tokens at training step `step`, from 0.

    With two streams the rule covers [noisy || clean], 2 `length` tokens. Without a step, annealing is over. `seed`
    decides which future edges of an annealed mask are open.
    """
    if recipe.streams == 2:
        return BlockDiffusion(length, recipe.block_size, recipe.clean_half, recipe.corruption == "jacobi")
    if step is None or recipe.anneal_steps == 0 or recipe.corruption == "none":
        return denoising_rule(recipe.rule, recipe.block_size)
    opened = linear_ramp(step, recipe.anneal_steps)
    if recipe.annealing == "look_ahead":
        return LookAhead(jnp.round(opened * length).astype(jnp.int32))
    return Annealed(opened, hash32(step.astype(jnp.uint32)) ^ jnp.uint32(seed))


@shape_checked
def denoising_rule(visibility: str, block_size: int | None = None, finished: Int[jax.Array, " b"] | None = None
                   ) -> Rule:
    """The rule of a `DiffusionSpec.visibility`, for one stream of text.

    block_size: for the two rules with blocks. finished: how many leading tokens of each sequence are clean; only
    `token_causal` depends on it, where by default all but the last block of a document are finished.
    """
    size = block_size or 1
    if visibility == "token_causal":
        return CausalThenLastBlock(size) if finished is None else CausalThenBlocks(size, finished[:, None])
    rules: dict[str, Rule] = {"causal": Causal(), "bidirectional": Bidirectional(), "block_causal": BlockCausal(size)}
    return rules[visibility]
