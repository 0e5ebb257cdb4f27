"""Three ways to log p(continuation | context): exact left to right, bounded by masking at random, and exact in the
order in which the model decodes; and DiffuLLaMA's score, which is none.

The noise of a row is a function of its key, of the draw's number, and of the token's place in the continuation. So it
does not depend on the other rows of a batch or on padding, and two rows with one key have it in common.

Letters: b rows, w tokens of the continuation.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlm_jax.diffusion.corruption import block_totals, top_k_per_block
from dlm_jax.evaluation.prediction import Denoiser, Rows, predict
from dlm_jax.models.weights import Params
from dlm_jax.parallel.mesh import local_mesh
from dlm_jax.typing import Array, Bool, Float, Float32, Int, Key, shape_checked

STRATA = 8  # draws of one round, each from its own eighth of the noise levels


def by_rows(estimate: Callable) -> Callable:
    """`estimate(params, ..., model=, size=)` of arrays with one row per text, split over the devices of this host."""
    @functools.partial(jax.jit, static_argnames=("model", "size"))
    def split(params: Params, *arrays: Array, model: Denoiser, size: int) -> Array:
        one_shard = functools.partial(estimate, model=model, size=size)
        mesh = local_mesh(len(jax.tree.leaves(arrays)[0]))
        if mesh is None:
            return one_shard(params, *arrays)
        rows = PartitionSpec(*mesh.axis_names)
        return jax.shard_map(one_shard, mesh=mesh, in_specs=(PartitionSpec(), *[rows] * len(arrays)), out_specs=rows,
                             check_vma=False)(params, *arrays)

    return split


@by_rows
@shape_checked
def left_to_right(params: Params, rows: Rows, *, model: Denoiser, size: int
                  ) -> tuple[Float32[Array, " b"], Bool[Array, " b"]]:
    """log p of each continuation, and whether greedy decoding writes it; exact for an autoregressive model."""
    _, there = rows.window(size)
    prediction = predict(params, rows, there, model, real_tokens=True)
    return jnp.sum(jnp.where(there, prediction.log_p, 0), 1), jnp.all(prediction.greedy | ~there, 1)


@by_rows
@shape_checked
def masked_draw(params: Params, rows: Rows, keys: Key[Array, " b"], draws: Int[Array, " b"], *, model: Denoiser,
                size: int) -> Float32[Array, " b"]:
    """One draw of the NELBO of each continuation, in nats.

    Of the m tokens of a block k are masked, k uniform in 1 .. m, and their losses count m/k times (LLaDA, arXiv
    2502.09992, equation 6): in expectation the bound with independent masks and the weight 1/t, at a smaller variance.
    """
    masked, weight = mask_at_random(rows, keys, draws, size, model)
    return -jnp.sum(weight * predict(params, rows, masked, model, real_tokens=False).log_p, 1)


@shape_checked
def mask_at_random(rows: Rows, keys: Key[Array, " b"], draws: Int[Array, " b"], size: int, model: Denoiser
                   ) -> tuple[Bool[Array, "b w"], Float32[Array, "b w"]]:
    """The tokens that a draw of the NELBO masks, and the weights m/k of their losses; 0 for all others."""
    _, there = rows.window(size)
    block = offset_in_block(rows, size, model)
    m = block_totals(there, block)
    t, scores = jax.vmap(draw_noise)(keys, draws, block)
    masked = there & top_k_per_block(jnp.where(there, scores, -jnp.inf), 1 + jnp.floor(t * m), block)
    return masked, jnp.where(masked, m / block_totals(masked, block), 0).astype(jnp.float32)


@by_rows
@shape_checked
def diffullama_draw(params: Params, rows: Rows, keys: Key[Array, " b"], t: Float32[Array, " b"], *, model: Denoiser,
                    size: int) -> Float32[Array, " b"]:
    """One term of the score by which DiffuLLaMA's evaluation compares answers (arXiv 2410.17891, `eval_forward` of its
    code): every token is masked with probability t; the mean loss of those that are, 0 where none is."""
    _, there = rows.window(size)
    masked = there & jax.vmap(lambda key, t: jax.random.uniform(key, (size,)) < t)(keys, t)
    log_p = predict(params, rows, masked, model, real_tokens=False).log_p
    return -jnp.sum(jnp.where(masked, log_p, 0), 1) / jnp.maximum(jnp.sum(masked, 1), 1)


@shape_checked
def draw_noise(key: Key[Array, ""], draw: Int[Array, ""], block: Int[Array, " w"]
               ) -> tuple[Float[Array, " w"], Float[Array, " w"]]:
    """The level in [0, 1) of each token's block, and the tokens' scores, of which the largest are masked.

    Over a round of draws the levels of a block are stratified, in an order that differs from block to block.
    """
    size = len(block)
    round_key, draw_key = jax.random.split(key)
    level_key, score_key = jax.random.split(jax.random.fold_in(draw_key, draw))
    # Neighbouring draws stay a pair of neighbouring strata, which `intervals.estimate` compares.
    rotation = 2 * jax.random.randint(jax.random.fold_in(round_key, draw // STRATA), (size,), 0, STRATA // 2)
    t = ((draw + rotation) % STRATA + jax.random.uniform(level_key, (size,))) / STRATA
    return t[jnp.arange(size) - block], jax.random.uniform(score_key, (size,))


@shape_checked
def offset_in_block(rows: Rows, size: int, model: Denoiser) -> Int[Array, "b w"]:
    """The index of each token of the continuation among those of its block, from 0."""
    index = jnp.broadcast_to(jnp.arange(size), (len(rows.first), size))
    if model.recipe.streams == 1:
        return index
    return jnp.minimum(index, rows.window(size)[0] % model.recipe.block_size)


@by_rows
@shape_checked
def decoding_order(params: Params, rows: Rows, exact: Bool[Array, " b"], *, model: Denoiser, size: int
                   ) -> tuple[Float32[Array, " b"], Bool[Array, " b"]]:
    """log p of each continuation when it is decoded one token at a time, the most confident first, and whether greedy
    decoding writes it.

    Which token is next depends on what is visible and never on what is hidden, so the probabilities of all texts sum
    to 1. The blocks of a block-causal model are decoded side by side, since each is conditioned on the true text before
    it. exact: rows whose probability is wanted to the end; the others stop once greedy decoding has left them, with a
    log p of the tokens until then.
    """
    block = offset_in_block(rows, size, model)
    _, there = rows.window(size)

    def decode(state: tuple) -> tuple:
        masked, log_p, greedy = state
        prediction = predict(params, rows, masked, model, real_tokens=True)
        confidence = jnp.where(masked, prediction.log_best, -jnp.inf)
        chosen = masked & top_k_per_block(confidence, jnp.ones_like(block), block)
        log_p += jnp.sum(jnp.where(chosen, prediction.log_p, 0), 1)
        return masked & ~chosen, log_p, greedy & jnp.all(prediction.greedy | ~chosen, 1)

    def unfinished(state: tuple) -> Array:
        masked, _, greedy = state
        return jnp.any(masked & (exact | greedy)[:, None])

    start = there, jnp.zeros(len(there)), jnp.ones(len(there), bool)
    return jax.lax.while_loop(unfinished, decode, start)[1:]
