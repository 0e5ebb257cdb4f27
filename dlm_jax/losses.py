"""What a recipe makes of a model and a batch: noise, visibility, and the sums of the loss.

Here the mathematics (`diffusion`), the rules (`attention`) and the model (`models`) meet.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.attention.plan import document_positions
from dlm_jax.attention.rules import Annealed, Bidirectional, BlockDiffusion, Causal, Rule, hash32
from dlm_jax.diffusion import corruption
from dlm_jax.diffusion.objective import shift, shift_two_streams
from dlm_jax.diffusion.recipes import Recipe
from dlm_jax.diffusion.schedule import annealing_probability, stratified_levels
from dlm_jax.head_loss import token_sums
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import forward
from dlm_jax.models.weights import Params


@struct.dataclass
class Noised:
    """A batch and its corruption; every array is [b, n].

    tokens: int, clean; segments: int, the document of each token, 0 for padding; targets: bool, tokens that count;
    masked: bool, targets that the noisy stream hides; t: fp32, the level of each token.
    """

    tokens: jax.Array
    segments: jax.Array
    targets: jax.Array
    masked: jax.Array
    t: jax.Array


@struct.dataclass
class Sums:
    """Sums over a batch, to be added over batches and divided once.

    loss: weighted cross-entropy; tokens: targets; masked_loss: unweighted cross-entropy of the masked; masked: how
    many. loss / tokens is the negative evidence lower bound (NELBO) in nats a token, where the weights are 1/t and the
    corruption is uniform; for plain autoregressive training it is the negative log-likelihood.
    """

    loss: jax.Array
    tokens: jax.Array
    masked_loss: jax.Array
    masked: jax.Array


def add_noise(key: jax.Array, tokens: jax.Array, segments: jax.Array, recipe: Recipe) -> Noised:
    """Draws levels and masks for a whole (global) batch, tokens and segments int [b, n].

    One level a sequence with one stream, one a block with two. Nothing but the key and the shape decides the draw.
    """
    b, n = tokens.shape
    targets = corruption.predictable(segments)
    if recipe.corruption == "none":
        return Noised(tokens, segments, targets, targets, jnp.ones((b, n)))
    level_key, mask_key = jax.random.split(key)
    block = recipe.block_size or n
    within = document_positions(Causal(), n, segments) % block if recipe.streams == 2 else jnp.arange(n)[None]
    within = jnp.broadcast_to(within, (b, n))
    levels = stratified_levels(level_key, (b, -(-n // block)), recipe.t_min)
    # A packed row has more blocks than an unbroken one: those beyond the end use the row's levels again.
    block_index = jnp.cumsum(within == 0, axis=1) - 1
    t = jnp.take_along_axis(levels, block_index % levels.shape[1], axis=1)
    if recipe.corruption == "uniform":
        masked = corruption.uniform(mask_key, t)
    else:
        masked = corruption.position_dependent(mask_key, t, within, block, recipe.half_life)
    return Noised(tokens, segments, targets, masked & targets, t)


def annealed_rule(recipe: Recipe, step: jax.Array, seed: int) -> Rule:
    """What one stream sees at training step `step`."""
    if recipe.corruption == "none":
        return Causal()
    if recipe.anneal_steps == 0:
        return Bidirectional()
    seed_of_step = hash32(step.astype(jnp.uint32)) ^ jnp.uint32(seed)
    return Annealed(annealing_probability(step, recipe.anneal_steps), seed_of_step)


def predictors(params: Params, batch: Noised, rule: Rule, mask_id: int | None, recipe: Recipe, config: ModelConfig,
               **compute: Any) -> jax.Array:
    """For each token of the text, the hidden state that predicts it: [b, n, d].

    `rule` is for one stream; two streams have their own. `compute` goes to `forward` (dtype, remat).
    """
    noisy = batch.tokens if mask_id is None else jnp.where(batch.masked, mask_id, batch.tokens)
    if recipe.corruption == "none":
        noisy = batch.tokens
    shifted = recipe.alignment == "shifted"
    if recipe.streams == 1:
        hidden = forward(params, noisy, config=config, rule=rule, segments=batch.segments, **compute)
        return shift(hidden) if shifted else hidden
    n = batch.tokens.shape[1]
    tokens, segments = jnp.concatenate([noisy, batch.tokens], 1), jnp.concatenate([batch.segments] * 2, 1)
    hidden = forward(params, tokens, config=config, rule=BlockDiffusion(n, recipe.block_size), segments=segments,
                     **compute)
    if not shifted:
        return hidden[:, :n]
    positions = document_positions(Causal(), n, batch.segments)
    return shift_two_streams(hidden[:, :n], hidden[:, n:], positions, recipe.block_size)


def loss_sums(params: Params, batch: Noised, rule: Rule, mask_id: int | None, recipe: Recipe, config: ModelConfig,
              **compute: Any) -> Sums:
    """The sums of the loss over a batch: cross-entropy of the masked targets, each weighted with 1/t (t = 1 where there
    is no corruption). Accumulated in fp32."""
    hidden = predictors(params, batch, rule, mask_id, recipe, config, **compute)
    masked = batch.masked.astype(jnp.float32)
    weights = jnp.stack([masked / batch.t, masked])
    loss, masked_loss = token_sums(params, hidden, batch.tokens, weights, config)
    return Sums(loss, jnp.sum(batch.targets), masked_loss, jnp.sum(batch.masked))
