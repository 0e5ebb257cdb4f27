"""A batch and its corruption, as a recipe draws it."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from dlm_jax.attention.plan import document_positions
from dlm_jax.attention.rules import Causal
from dlm_jax.diffusion import corruption, weighting
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.diffusion.schedule import growth, stratified_levels


@struct.dataclass
class Noised:
    """A batch and its corruption; every array but the last is [b, n].

    tokens: int, clean; segments: int, the document of each token, 0 for padding; targets: bool, tokens that count;
    masked: bool, targets that the noisy stream hides; t: fp32, the level of each token; weight: fp32, what the loss at
    a masked token counts, such that the sum over the batch divided by its targets is the loss. source: fp32
    [b, sources], 1 at the source of each row where they are told apart.
    """

    tokens: jax.Array
    segments: jax.Array
    targets: jax.Array
    masked: jax.Array
    t: jax.Array
    weight: jax.Array
    source: jax.Array


def add_noise(key: jax.Array, tokens: jax.Array, segments: jax.Array, recipe: Recipe,
              step: jax.Array | None = None) -> Noised:
    """Draws levels and masks for a whole (global) batch, tokens and segments int [b, n]; segments as they are recorded,
    with `corruption.GIVEN` at the tokens of prompts, which are never masked and never count. Nor does padding; an end
    token is a token like any other.

    Nothing but the key, the shape, the segments and the schedules at `step` decides the draw; without a step the
    schedules are over. Complementary masks make two rows of each record: [2b, n].
    """
    segments, given = corruption.part_given(segments)
    targets = corruption.predictable(segments) & ~given
    if recipe.corruption == "none":
        ones = jnp.ones(tokens.shape)
        return Noised(tokens, segments, targets, targets, ones, targets.astype(jnp.float32), nowhere(tokens))
    level_key, mask_key = jax.random.split(key)
    within = index_in_block(segments, recipe)
    t = draw_levels(level_key, within, recipe, step)
    masked = draw_mask(mask_key, t, within, targets, recipe, step)
    if recipe.complementary:
        masked, t = pairs(masked, targets & ~masked), pairs(t, 1 - t)
        tokens, segments, targets, within = (pairs(x, x) for x in (tokens, segments, targets, within))
    batch = Noised(tokens, segments, targets, masked, t, masked.astype(jnp.float32), nowhere(tokens))
    weight = weighting.over_tokens(weigh(batch, within, recipe, step), masked, targets, recipe.normaliser)
    return dataclasses.replace(batch, weight=weight)


def nowhere(tokens: jax.Array) -> jax.Array:
    """The source of rows whose sources are not told apart: fp32 [b, 0]."""
    return jnp.zeros((tokens.shape[0], 0))


def with_sources(batch: Noised, source: jax.Array, count: int) -> Noised:
    """The batch with the source of each record, int [records], among `count`; a record may have made two rows."""
    known = jax.nn.one_hot(source, count, dtype=jnp.float32)
    return dataclasses.replace(batch, source=jnp.repeat(known, batch.tokens.shape[0] // source.shape[0], axis=0))


def index_in_block(segments: jax.Array, recipe: Recipe) -> jax.Array:
    """The index of each token in its block, int [b, n]: from the start of its document with two streams; with one, the
    record is the block."""
    n = segments.shape[1]
    if recipe.streams == 2:
        return document_positions(Causal(), n, segments) % recipe.block_size
    return jnp.broadcast_to(jnp.arange(n), segments.shape)


def draw_levels(key: jax.Array, within: jax.Array, recipe: Recipe, step: jax.Array | None) -> jax.Array:
    """Stratified levels t of each token, fp32 [b, n]: one a block, or one a record."""
    b, n = within.shape
    t_max: jax.Array | float = recipe.t_max
    if recipe.level_warmup and step is not None:
        t_max = recipe.t_min + (recipe.t_max - recipe.t_min) * growth(step, recipe.level_warmup)
    per_block = recipe.streams == 2 and recipe.levels == "block"
    blocks = -(-n // recipe.block_size) if per_block else 1
    levels = stratified_levels(key, (b, blocks), recipe.t_min, t_max)
    # A packed row has more blocks than an unbroken one: those beyond the end use the row's levels again.
    block_index = jnp.cumsum(within == 0, axis=1) - 1
    return jnp.take_along_axis(levels, block_index % blocks, axis=1)


def draw_mask(key: jax.Array, t: jax.Array, within: jax.Array, targets: jax.Array, recipe: Recipe,
              step: jax.Array | None) -> jax.Array:
    """The targets that are masked: bool [b, n]."""
    least = int(recipe.at_least_one)
    if recipe.corruption == "exact_count":
        return corruption.exact_count(key, t, within, targets, least)
    if recipe.corruption == "position_dependent":
        half_life: jax.Array | float = recipe.half_life
        if recipe.half_life_steps and step is not None:
            half_life = half_life / growth(step, recipe.half_life_steps)
        return corruption.position_dependent(key, t, within, recipe.block_size, half_life, targets, least)
    if recipe.at_least_one:
        return corruption.uniform_at_least_one(key, t, within, targets)
    return corruption.uniform(key, t) & targets


def weigh(batch: Noised, within: jax.Array, recipe: Recipe, step: jax.Array | None) -> jax.Array:
    """The recipe's weights of the masked tokens, fp32 [b, n]; all 1 while the levels warm up."""
    if recipe.weight == "none":
        return batch.weight
    if recipe.weight == "inverse_level":
        weight = weighting.inverse_level(batch.masked, batch.t)
    elif recipe.weight == "inverse_count":
        weight = weighting.inverse_count(batch.masked, batch.targets, within)
    else:
        weight = weighting.cart(batch.masked, (batch.segments > 0) & ~batch.masked, batch.segments)
    if recipe.level_warmup and step is not None:
        return jnp.where(step < recipe.level_warmup, batch.weight, weight)
    return weight


def pairs(first: jax.Array, second: jax.Array) -> jax.Array:
    """Rows of both, one after the other, so that a pair stays on one device: [b, n] twice to [2b, n]."""
    return jnp.stack([first, second], axis=1).reshape(-1, *first.shape[1:])
