"""A batch and its corruption, as a recipe draws it. Letters: b batch, n tokens."""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax import struct
from dlm_jax.diffusion import corruption, weighting
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.diffusion.schedule import linear_ramp, stratified_levels
from dlm_jax.segments import Documents, find_documents, predictable, split_prompt_bit
from dlm_jax.typing import Array, Float, Float32, Int, Key, Mask, Segments, Shaped, Tokens, shape_checked


@struct.dataclass
class NoisyBatch:
    """A batch and its corruption. The loss is the weighted sum over the batch divided by its number of targets."""

    tokens: Tokens  # clean
    segments: Segments  # the document of each token, from 1; 0 is padding
    documents: Documents  # the same, as the bounds of each token's document
    targets: Mask  # tokens that count
    masked: Mask  # targets that the noisy stream hides
    t: Float32[Array, "b n"]  # the level at each token
    weight: Float32[Array, "b n"]  # of the loss at each masked token; 0 elsewhere
    source: Float32[Array, "b sources"]  # one-hot source of each row; no columns where sources are not distinguished
    guesses: Tokens | None = None  # what the noisy stream shows in the place of masked tokens; None: the mask token


@shape_checked
def add_noise(key: Key[Array, ""], tokens: Tokens, segments: Segments, recipe: Recipe,
              step: Int[Array, ""] | None = None) -> NoisyBatch:
    """Draws levels and masks for a global batch.

    `segments` come as recorded, with `segments.PROMPT_BIT` set at the tokens of prompts. Prompts and padding are never
    masked and never count; an end token is a token like any other. The draw depends only on the key, the shape, the
    segments and the schedules at `step`; without a step the schedules are over. Complementary masks turn each record
    into two rows, [2b, n].
    """
    segments, prompt = split_prompt_bit(segments)
    documents = find_documents(segments.shape[1], segments)
    targets = predictable(segments) & ~prompt
    if recipe.corruption == "none":
        return NoisyBatch(tokens, segments, documents, targets, masked=targets, t=jnp.ones(tokens.shape),
                          weight=targets.astype(jnp.float32), source=no_sources(tokens))
    level_key, mask_key = jax.random.split(key)
    offset_in_block = block_offsets(documents, recipe)
    t = draw_levels(level_key, offset_in_block, recipe, step)
    masked = draw_mask(mask_key, t, offset_in_block, targets, recipe, step)
    if recipe.complementary:
        masked, t = interleave_rows(masked, targets & ~masked), interleave_rows(t, 1 - t)
        tokens, segments, documents, targets, offset_in_block = jax.tree.map(
            lambda x: interleave_rows(x, x), (tokens, segments, documents, targets, offset_in_block))
    guesses = random_tokens(mask_key, tokens) if recipe.corruption == "jacobi" else None
    batch = NoisyBatch(tokens, segments, documents, targets, masked, t, masked.astype(jnp.float32), no_sources(tokens),
                       guesses)
    weight = loss_weights(batch, offset_in_block, recipe, step)
    weight = weighting.normalize_weights(weight, masked, targets, recipe.normalizer)
    return dataclasses.replace(batch, weight=weight)


def random_tokens(key: Key[Array, ""], tokens: Tokens) -> Tokens:
    """A token of the same row for each position."""
    return jnp.take_along_axis(tokens, jax.random.randint(key, tokens.shape, 0, tokens.shape[1]), 1)


def no_sources(tokens: Tokens) -> Float32[jax.Array, "b 0"]:
    """`NoisyBatch.source` of rows whose sources are not distinguished."""
    return jnp.zeros((tokens.shape[0], 0))


@shape_checked
def with_sources(batch: NoisyBatch, source: Int[Array, " records"], count: int) -> NoisyBatch:
    """The batch with the source of each record, among `count` of them; a record may have become two rows."""
    known = jax.nn.one_hot(source, count, dtype=jnp.float32)
    return dataclasses.replace(batch, source=jnp.repeat(known, batch.tokens.shape[0] // source.shape[0], axis=0))


@shape_checked
def block_offsets(documents: Documents, recipe: Recipe) -> Int[Array, "b n"]:
    """The index of each token in its block. With two streams blocks start with the document; with one stream the record
    is the block."""
    if recipe.streams == 2:
        return documents.positions % recipe.block_size
    return jnp.broadcast_to(jnp.arange(documents.index.shape[1]), documents.index.shape)


@shape_checked
def draw_levels(key: Key[Array, ""], offset_in_block: Int[Array, "b n"], recipe: Recipe,
                step: Int[Array, ""] | None) -> Float32[Array, "b n"]:
    """Stratified levels t at each token: one per block, or one per record."""
    b, n = offset_in_block.shape
    t_max: Array | float = recipe.t_max
    if recipe.level_warmup and step is not None:
        t_max = recipe.t_min + (recipe.t_max - recipe.t_min) * linear_ramp(step, recipe.level_warmup)
    per_block = recipe.streams == 2 and recipe.level_per == "block"
    blocks = -(-n // recipe.block_size) if per_block else 1
    levels = stratified_levels(key, (b, blocks), recipe.t_min, t_max)
    # A packed row has more blocks than an unbroken one; those beyond the end reuse the row's levels.
    block_index = jnp.cumsum(offset_in_block == 0, axis=1) - 1
    return jnp.take_along_axis(levels, block_index % blocks, axis=1)


@shape_checked
def draw_mask(key: Key[Array, ""], t: Float[Array, "b n"], offset_in_block: Int[Array, "b n"],
              targets: Mask, recipe: Recipe, step: Int[Array, ""] | None) -> Mask:
    """The targets that are masked."""
    min_count = 1 if recipe.min_one_mask else 0
    if recipe.corruption == "jacobi":
        return corruption.block_ends(t, offset_in_block, targets)
    if recipe.corruption == "exact_count":
        return corruption.exact_count(key, t, offset_in_block, targets, min_count)
    if recipe.corruption == "position_dependent":
        half_life: Array | float = recipe.half_life
        if recipe.half_life_steps and step is not None:
            half_life = half_life / linear_ramp(step, recipe.half_life_steps)
        return corruption.position_dependent(key, t, offset_in_block, recipe.block_size, half_life, targets, min_count)
    if recipe.min_one_mask:
        return corruption.uniform_min_one(key, t, offset_in_block, targets)
    return corruption.uniform(key, t) & targets


@shape_checked
def loss_weights(batch: NoisyBatch, offset_in_block: Int[Array, "b n"], recipe: Recipe,
                 step: Int[Array, ""] | None) -> Float[Array, "b n"]:
    """The recipe's weights of the masked tokens; all 1 while the levels warm up."""
    if recipe.loss_weight == "none":
        return batch.weight
    if recipe.loss_weight == "inverse_level":
        weight = weighting.inverse_level(batch.masked, batch.t)
    elif recipe.loss_weight == "inverse_count":
        weight = weighting.inverse_count(batch.masked, batch.targets, offset_in_block)
    else:
        visible = (batch.segments > 0) & ~batch.masked
        weight = weighting.cart(batch.masked, visible, batch.segments)
    if recipe.level_warmup and step is not None:
        return jnp.where(step < recipe.level_warmup, batch.weight, weight)
    return weight


@shape_checked
def interleave_rows(first: Shaped[Array, "b n"], second: Shaped[Array, "b n"]) -> Shaped[Array, "2*b n"]:
    """The rows of both in turn, so that a pair stays on one device."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
