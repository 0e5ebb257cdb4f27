"""A recipe's loss of a model on a noisy batch, as sums.

Here the mathematics (`diffusion`), the rules (`attention`) and the model (`models`) meet. Letters: b batch, n tokens,
d width, v vocabulary.

The weights (1/t, m/k) come with the batch, from `diffusion.noise.loss_weights`; `training.step` divides the sums.
"""

from typing import Unpack

import jax
import jax.numpy as jnp

from dlm_jax import struct
from dlm_jax.attention.rules import Causal, Rule
from dlm_jax.diffusion.cross_entropy import divergence_sum, shift, shift_two_streams, uncertainty
from dlm_jax.diffusion.noise import NoisyBatch
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import ForwardOptions, forward, unembed
from dlm_jax.models.weights import Params
from dlm_jax.objective.sharded_cross_entropy import sharded_cross_entropy
from dlm_jax.parallel.mesh import AXES, axis_size
from dlm_jax.segments import Documents
from dlm_jax.typing import Array, Float, Float32, Hidden, Int, Tokens, shape_checked

TokenId = int | Int[Array, ""]


@struct.dataclass
class LossSums:
    """Sums over a batch, to be added over batches and divided once.

    With weights of 1/t and uniform corruption, loss / target_count is the negative evidence lower bound (NELBO) in
    nats per token; for plain autoregressive training it is the negative log-likelihood.
    """

    loss: Float32[jax.Array, ""]  # what is minimized
    target_count: Int[jax.Array, ""]  # number of targets
    masked_loss: Float32[jax.Array, ""]  # unweighted cross-entropy of the masked tokens
    masked: Int[jax.Array, ""]  # number of masked tokens
    ar_loss: Float32[jax.Array, ""]  # next-token cross-entropy of the targets on the clean half; 0 without `ar_weight`
    kl: Float32[jax.Array, ""]  # divergence from the base there, over the targets; 0 without `kl_weight`
    by_source: Float32[jax.Array, "sources 2"]  # masked_loss and masked of each source of a mixture


@shape_checked
def hidden_states(params: Params, batch: NoisyBatch, rule: Rule, mask_id: TokenId | None, recipe: Recipe,
                  config: ModelConfig, **options: Unpack[ForwardOptions]
                  ) -> tuple[Float[jax.Array, "b n d"], Float[jax.Array, "b n d"] | None]:
    """Hidden states of the noisy text, and with two streams those of the clean half (else None).

    rule: that of `training_rule` for the recipe.
    """
    noisy, instead = batch.tokens, mask_id if batch.guesses is None else batch.guesses
    if instead is not None and recipe.corruption != "none":
        noisy = jnp.where(batch.masked, instead, noisy)
    if recipe.streams == 1:
        return forward(params, noisy, config=config, rule=rule, segments=batch.segments, documents=batch.documents,
                       **options), None
    n = batch.tokens.shape[1]
    tokens, segments = jnp.concatenate([noisy, batch.tokens], 1), jnp.concatenate([batch.segments] * 2, 1)
    hidden = forward(params, tokens, config=config, rule=rule, segments=segments,
                     documents=batch.documents.two_streams(n), **options)
    return hidden[:, :n], hidden[:, n:]


@shape_checked
def align_to_targets(noisy: Hidden, clean: Hidden | None, documents: Documents, recipe: Recipe
                     ) -> Float[Array, "b n d"]:
    """For each token of the text, the hidden state that predicts it."""
    if recipe.alignment == "same_position":
        return noisy
    if clean is None:
        return shift(noisy)
    return shift_two_streams(noisy, clean, documents.positions, recipe.block_size)


@shape_checked
def target_hidden(params: Params, batch: NoisyBatch, rule: Rule, mask_id: TokenId | None, recipe: Recipe,
                  config: ModelConfig, **options: Unpack[ForwardOptions]) -> Float[Array, "b n d"]:
    """For each token, the hidden state that predicts it: `align_to_targets` of `hidden_states`."""
    noisy, clean = hidden_states(params, batch, rule, mask_id, recipe, config, **options)
    return align_to_targets(noisy, clean, batch.documents, recipe)


@shape_checked
def loss_sums(params: Params, batch: NoisyBatch, rule: Rule, mask_id: TokenId | None, recipe: Recipe,
              config: ModelConfig, teacher: Params | None = None, **options: Unpack[ForwardOptions]) -> LossSums:
    """The sums of the loss over a batch, accumulated in fp32: the weighted cross-entropy of the masked targets, and
    from the same forward pass what the recipe asks of the clean half. `teacher` is the base that `kl_weight` holds it
    to."""
    noisy, clean = hidden_states(params, batch, rule, mask_id, recipe, config, **options)
    targets = batch.targets.astype(jnp.float32)
    masked = batch.masked.astype(jnp.float32)
    by_source = masked[None] * batch.source.T[..., None]  # [sources, b, n]
    weights = jnp.concatenate([jnp.stack([batch.weight, masked]), by_source])
    hidden = align_to_targets(noisy, clean, batch.documents, recipe)
    extra = uncertainty if recipe.certainty_weight else None
    sums = sharded_cross_entropy(params, hidden, batch.tokens, weights, config, extra)
    loss, masked_loss, source_losses = sums[0], sums[1], sums[2:len(weights)]
    if recipe.certainty_weight:
        loss += recipe.certainty_weight * sums[-1]
    by_source_sums = jnp.stack([source_losses, jnp.sum(by_source, (1, 2))], 1)
    ar_loss = kl = jnp.zeros(())
    if recipe.ar_weight and clean is not None:
        ar_loss = next_token_loss(params, clean, batch.tokens, targets, config)
        loss += recipe.ar_weight * ar_loss
    if recipe.kl_weight and clean is not None:
        assert teacher is not None, "a divergence needs the base"
        base = forward(teacher, batch.tokens, config=config, rule=Causal(), segments=batch.segments,
                       documents=batch.documents, **options)
        kl = divergence_from_base(params, teacher, clean, base, targets, config)
        loss += recipe.kl_weight * kl
    return LossSums(loss, jnp.sum(batch.targets), masked_loss, jnp.sum(batch.masked), ar_loss, kl, by_source_sums)


@shape_checked
def next_token_loss(params: Params, clean: Hidden, tokens: Tokens, targets: Float32[Array, "b n"], config: ModelConfig
                    ) -> Float32[jax.Array, ""]:
    """The next-token cross-entropy of the clean half, summed over the targets (1 at a target, else 0)."""
    return sharded_cross_entropy(params, shift(clean), tokens, targets[None], config)[0]


@shape_checked
def divergence_from_base(params: Params, teacher: Params, clean: Hidden, base: Hidden,
                         targets: Float32[Array, "b n"], config: ModelConfig) -> Float32[jax.Array, ""]:
    """KL(base || clean half) of next-token distributions, summed over the targets, from the hidden states of both."""
    # Each device computes the logits of its part of the batch and of the vocabulary.
    local_vocab = -(-config.vocab_size // axis_size(*AXES))
    return divergence_sum(shift(clean), shift(base), targets, lambda h: unembed(params, h, config),
                          lambda h: unembed(teacher, h, config), local_vocab)
