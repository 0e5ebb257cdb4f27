"""What a recipe makes of a model and a noisy batch: visibility, and the sums of the loss.

Here the mathematics (`diffusion`), the rules (`attention`) and the model (`models`) meet.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.attention.plan import document_positions
from dlm_jax.attention.rules import (
    Annealed,
    Bidirectional,
    BlockCausal,
    BlockDiffusion,
    Causal,
    LookAhead,
    Rule,
    hash32,
)
from dlm_jax.diffusion.objective import divergence_sum, shift, shift_two_streams
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.diffusion.schedule import growth
from dlm_jax.head_loss import token_sums
from dlm_jax.mesh import shares
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.models.weights import Params
from dlm_jax.noise import Noised


@struct.dataclass
class Sums:
    """Sums over a batch, to be added over batches and divided once.

    loss: what is minimised; tokens: targets; masked_loss: unweighted cross-entropy of the masked; masked: how many;
    ar_loss: next-token cross-entropy on the clean half, kl: divergence there from the base, over the targets; 0 where
    the recipe has none; by_source: masked_loss and masked of each source of a mixture, [sources, 2]. Where the weights
    are 1/t and the corruption uniform, loss / tokens is the negative evidence lower bound (NELBO) in nats a token; for
    plain autoregressive training it is the negative log-likelihood.
    """

    loss: jax.Array
    tokens: jax.Array
    masked_loss: jax.Array
    masked: jax.Array
    ar_loss: jax.Array
    kl: jax.Array
    by_source: jax.Array


def annealed_rule(recipe: Recipe, step: jax.Array, seed: int, length: int) -> Rule:
    """What one stream of `length` tokens sees at training step `step`."""
    if recipe.corruption == "none":
        return Causal()
    if recipe.anneal_steps == 0:
        return BlockCausal(recipe.block_size) if recipe.block_size else Bidirectional()
    opened = growth(step, recipe.anneal_steps)
    if recipe.annealing == "look_ahead":
        return LookAhead(jnp.round(opened * length).astype(jnp.int32))
    seed_of_step = hash32(step.astype(jnp.uint32)) ^ jnp.uint32(seed)
    return Annealed(opened, seed_of_step)


def outputs(params: Params, batch: Noised, rule: Rule, mask_id: int | None, recipe: Recipe, config: ModelConfig,
            **compute: Any) -> tuple[jax.Array, jax.Array | None]:
    """The hidden states [b, n, d] of the noisy text, and with two streams those of the clean half.

    `rule` is for one stream; two streams have their own. `compute` goes to `forward` (dtype, remat).
    """
    noisy = batch.tokens
    if mask_id is not None and recipe.corruption != "none":
        noisy = jnp.where(batch.masked, mask_id, noisy)
    if recipe.streams == 1:
        return forward(params, noisy, config=config, rule=rule, segments=batch.segments, **compute), None
    n = batch.tokens.shape[1]
    tokens, segments = jnp.concatenate([noisy, batch.tokens], 1), jnp.concatenate([batch.segments] * 2, 1)
    both = BlockDiffusion(n, recipe.block_size, recipe.clean_half)
    hidden = forward(params, tokens, config=config, rule=both, segments=segments, **compute)
    return hidden[:, :n], hidden[:, n:]


def aligned(noisy: jax.Array, clean: jax.Array | None, segments: jax.Array, recipe: Recipe) -> jax.Array:
    """For each token of the text, the hidden state that predicts it: [b, n, d]."""
    if recipe.alignment == "same_position":
        return noisy
    if clean is None:
        return shift(noisy)
    positions = document_positions(Causal(), noisy.shape[1], segments)
    return shift_two_streams(noisy, clean, positions, recipe.block_size)


def predictors(params: Params, batch: Noised, rule: Rule, mask_id: int | None, recipe: Recipe, config: ModelConfig,
               **compute: Any) -> jax.Array:
    """`aligned` of `outputs`: for each token, the hidden state that predicts it, [b, n, d]."""
    return aligned(*outputs(params, batch, rule, mask_id, recipe, config, **compute), batch.segments, recipe)


def loss_sums(params: Params, batch: Noised, rule: Rule, mask_id: int | None, recipe: Recipe, config: ModelConfig,
              teacher: Params | None = None, **compute: Any) -> Sums:
    """The sums of the loss over a batch, accumulated in fp32: weighted cross-entropy of the masked targets, and in the
    same pass what the recipe asks of the clean half; `teacher` is the base that it is held to."""
    noisy, clean = outputs(params, batch, rule, mask_id, recipe, config, **compute)
    targets = batch.targets.astype(jnp.float32)
    masked = batch.masked.astype(jnp.float32)
    by_source = masked[None] * batch.source.T[..., None]  # [sources, b, n]
    weights = jnp.concatenate([jnp.stack([batch.weight, masked]), by_source])
    hidden = aligned(noisy, clean, batch.segments, recipe)
    sums = token_sums(params, hidden, batch.tokens, weights, config)
    loss, masked_loss, of_sources = sums[0], sums[1], jnp.stack([sums[2:], jnp.sum(by_source, (1, 2))], 1)
    ar_loss = kl = jnp.zeros(())
    if recipe.ar_weight and clean is not None:
        ar_loss = token_sums(params, shift(clean), batch.tokens, targets[None], config)[0]
        loss += recipe.ar_weight * ar_loss
    if recipe.kl_weight and clean is not None:
        assert teacher is not None, "a divergence needs the base"
        base = forward(teacher, batch.tokens, config=config, rule=Causal(), segments=batch.segments, **compute)
        # Each device makes the logits of its share of the batch and of the vocabulary.
        share = -(-config.vocab_size // shares("replica", "fsdp", "tensor"))
        kl = divergence_sum(shift(clean), shift(base), targets, lambda h: unembed(params, h, config),
                            lambda h: unembed(teacher, h, config), share)
        loss += recipe.kl_weight * kl
    return Sums(loss, jnp.sum(batch.targets), masked_loss, jnp.sum(batch.masked), ar_loss, kl, of_sources)
