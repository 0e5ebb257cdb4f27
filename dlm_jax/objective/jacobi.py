"""What a Jacobi iteration looks like on its way, for training (Jacobi Forcing, arXiv 2512.14681).

Jacobi decoding (arXiv 2305.10427) guesses the tokens of a block and replaces them all by what the model says to them,
until nothing changes; the beginning of the block is right first. Training shows the model such a state and asks for the
end of it.

Letters: b batch, n tokens, d width.
"""

import dataclasses
from typing import Unpack

import jax
import jax.numpy as jnp

from dlm_jax.attention.rules import Rule
from dlm_jax.diffusion.noise import NoisyBatch
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import ForwardOptions, unembed
from dlm_jax.models.weights import Params
from dlm_jax.objective.loss import target_hidden
from dlm_jax.typing import Hidden, Tokens, shape_checked

ITERATIONS = 2  # that the wrong end of a block has been through, from random tokens
LOGITS = 2**26  # computed at once


@shape_checked
def iterate_guesses(params: Params, batch: NoisyBatch, rule: Rule, recipe: Recipe, config: ModelConfig,
                    **options: Unpack[ForwardOptions]) -> NoisyBatch:
    """The batch with what `ITERATIONS` iterations of the model make of its `guesses`, which are random at first. No
    gradient passes.

    The paper records trajectories beforehand and looks for a state with as many right tokens as wanted. Here so many
    are right to begin with, and the iteration starts behind them.
    """
    params = jax.lax.stop_gradient(params)
    for _ in range(ITERATIONS):
        hidden = target_hidden(params, batch, rule, None, recipe, config, **options)
        batch = dataclasses.replace(batch, guesses=likeliest(params, hidden, config))
    return batch


def likeliest(params: Params, hidden: Hidden, config: ModelConfig) -> Tokens:
    """The token with the largest logit, of a few positions at a time."""
    size = max(1, LOGITS // (hidden.shape[0] * config.vocab_size))
    found = jax.lax.map(lambda h: jnp.argmax(unembed(params, h, config), -1).astype(jnp.int32),
                        jnp.swapaxes(hidden, 0, 1), batch_size=size)
    return found.T
