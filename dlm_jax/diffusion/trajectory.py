"""A batch of texts that a model wrote itself, corrupted as it stood while they were written.

A text is written in steps, and each step commits some tokens given those of earlier steps. The log probability of the
text along that path is the sum over steps of those of the tokens that the step commits. One step of each block, drawn
uniformly and weighted by their number, estimates that sum without bias, at the price of one forward pass.

Letters: b batch, n tokens, w tokens per block.
"""

import jax
import jax.numpy as jnp

from dlm_jax.diffusion.noise import NoisyBatch, no_sources
from dlm_jax.segments import find_documents, split_prompt_bit
from dlm_jax.typing import Array, Float32, Int, Segments, Tokens, shape_checked


@shape_checked
def trajectory_batch(u: Float32[Array, "b 1"], tokens: Tokens, segments: Segments, commit_step: Int[Array, "b n"],
                     advantage: Float32[Array, " b"], block_size: int) -> NoisyBatch:
    """The batch whose loss is minus the sum over texts of advantage times log probability of the text along its path,
    divided by the number of tokens that were written (the policy gradient).

    Each row is one text from position 0. u: uniform in [0, 1), which step of each block is taken: one number for all
    blocks of a text, since a mean of sums needs no more. commit_step: the step, from 1, that wrote each token; 0 for
    the prompt and for padding. block_size: 0 if the whole text is one block. What was written from the step on is
    masked, and what it wrote itself has the weight.
    """
    segments, _ = split_prompt_bit(segments)
    written = commit_step > 0
    first, count = steps_of_blocks(commit_step, block_size)
    s = first + jnp.minimum(jnp.floor(u * count), count - 1).astype(jnp.int32)
    weight = advantage[:, None] * count * (commit_step == s) * written
    return NoisyBatch(tokens, segments, find_documents(tokens.shape[1], segments), targets=written,
                      masked=written & (commit_step >= s), t=jnp.ones(tokens.shape), weight=weight,
                      source=no_sources(tokens))


@shape_checked
def steps_of_blocks(commit_step: Int[Array, "b n"], block_size: int) -> tuple[Int[Array, "b n"], Int[Array, "b n"]]:
    """The first step of each token's block, and how many steps wrote the block; 0 where none did."""
    b, n = commit_step.shape
    w = block_size or n
    blocks = jnp.pad(commit_step, ((0, 0), (0, -n % w))).reshape(b, -1, w)
    last = jnp.max(blocks, -1, keepdims=True)
    first = jnp.min(jnp.where(blocks > 0, blocks, last), -1, keepdims=True)

    def spread(x: jax.Array) -> jax.Array:
        return jnp.broadcast_to(x, blocks.shape).reshape(b, -1)[:, :n]

    return spread(first), spread(jnp.where(last > 0, last - first + 1, 0))


@shape_checked
def advantages(rewards: Float32[Array, "prompts group"]) -> Float32[Array, "prompts group"]:
    """How much better each answer is than the mean of its group (GRPO, arXiv 2402.03300, without the division by the
    standard deviation, as in diffu-GRPO, arXiv 2504.12216)."""
    return rewards - jnp.mean(rewards, -1, keepdims=True)
