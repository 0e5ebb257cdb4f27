"""What a model says of each token of a continuation, given its context and the continuation's tokens that are visible.

Letters: b rows, n tokens, w tokens of the continuation (the window), d width, k hidden states, v vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax import struct
from dlm_jax.attention.rules import Causal
from dlm_jax.attention.visibility import training_rule
from dlm_jax.diffusion.cross_entropy import LOGITS_BUDGET
from dlm_jax.diffusion.guidance import guide
from dlm_jax.diffusion.noise import NoisyBatch, no_sources
from dlm_jax.diffusion.recipe import Recipe
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.models.weights import Params
from dlm_jax.objective.loss import target_hidden
from dlm_jax.segments import find_documents
from dlm_jax.typing import Array, Bool, Float, Float32, Int, Segments, Tokens, shape_checked


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """How a model is asked; static. A plain autoregressive model has no mask token and reads left to right."""

    config: ModelConfig
    recipe: Recipe  # of `denoising_recipe`, or `AR`
    mask_id: int | None
    cfg_scale: float = 0.0  # classifier-free guidance, as the sampler has it

    @property
    def autoregressive(self) -> bool:
        """Whether the model is asked left to right."""
        return self.recipe.corruption == "none"

    @property
    def max_tokens(self) -> int:
        """Tokens of a context with its continuation. What predicts the last token left to right does not read it."""
        return self.config.max_length + self.autoregressive


@struct.dataclass
class Rows:
    """Contexts, each followed by its continuation."""

    tokens: Tokens
    segments: Segments  # 1 for text, 0 for padding
    first: Int[Array, " b"]  # where the continuation begins, at least 1
    length: Int[Array, " b"]  # its number of tokens

    def window(self, size: int) -> tuple[Int[Array, "b w"], Bool[Array, "b w"]]:
        """The positions of the first `size` tokens of the continuation, and which of them there are."""
        offsets = jnp.arange(size)
        return self.first[:, None] + offsets, offsets < self.length[:, None]


@struct.dataclass
class Prediction:
    """The model's distribution of each token of the window, in short."""

    log_p: Float32[Array, "b w"]  # log probability of the token that is there
    log_best: Float32[Array, "b w"]  # of the most probable token
    greedy: Bool[Array, "b w"]  # whether these are one token


@shape_checked
def predict(params: Params, rows: Rows, masked: Bool[Array, "b w"], model: Denoiser, real_tokens: bool) -> Prediction:
    """Asks the model for all tokens of the window at once, those that are not `masked` being visible.

    real_tokens: leave the mask token out of the distribution, as the sampler does; the loss does not.
    """
    positions, _ = rows.window(masked.shape[1])
    if model.autoregressive:
        hidden = [causal_hidden(params, rows, model)]
    else:
        hidden = [noisy_hidden(params, rows, masked, model)]
    if model.cfg_scale:
        hidden.append(noisy_hidden(params, without_context(rows, model.mask_id), masked, model))
    window = jnp.stack([jnp.take_along_axis(h, positions[..., None], 1, mode="clip") for h in hidden], 2)  # b w k d
    targets = jnp.take_along_axis(rows.tokens, positions, 1, mode="clip")

    def of_token(hidden: jax.Array, target: jax.Array) -> Prediction:  # k d
        of_each = unembed(params, hidden, model.config)
        logits = guide(of_each[0], of_each[1], model.cfg_scale) if model.cfg_scale else of_each[0]
        if real_tokens and model.mask_id is not None:
            logits = logits.at[model.mask_id].set(-jnp.inf)
        log_p = jax.nn.log_softmax(logits)
        return Prediction(log_p[target], jnp.max(log_p), jnp.argmax(log_p) == target)

    flat = jax.lax.map(lambda x: of_token(*x), (window.reshape(-1, *window.shape[2:]), targets.reshape(-1)),
                       batch_size=max(1, LOGITS_BUDGET // model.config.vocab_size))
    return jax.tree.map(lambda x: x.reshape(targets.shape), flat)


@shape_checked
def causal_hidden(params: Params, rows: Rows, model: Denoiser) -> Float[Array, "b n d"]:
    """For each token, the hidden state that predicts it from those before it. The last token is not read."""
    tokens, segments = rows.tokens[:, :-1], rows.segments[:, :-1]
    hidden = forward(params, tokens, config=model.config, rule=Causal(), segments=segments)
    return jnp.pad(hidden, ((0, 0), (1, 0), (0, 0)))


@shape_checked
def noisy_hidden(params: Params, rows: Rows, masked: Bool[Array, "b w"], model: Denoiser) -> Float[Array, "b n d"]:
    """For each token, the hidden state that predicts it when the `masked` tokens of the continuation are hidden."""
    b, n = rows.tokens.shape
    positions, there = rows.window(masked.shape[1])
    hide = jnp.zeros((b, n), bool).at[jnp.arange(b)[:, None], positions].max(masked & there, mode="drop")
    batch = NoisyBatch(rows.tokens, rows.segments, find_documents(n, rows.segments), targets=hide, masked=hide,
                       t=jnp.ones((b, n)), weight=jnp.ones((b, n)), source=no_sources(rows.tokens))
    return target_hidden(params, batch, training_rule(model.recipe, n), model.mask_id, model.recipe, model.config)


def without_context(rows: Rows, mask_id: int | None) -> Rows:
    """The rows with every token of the context masked: what guidance moves away from."""
    assert mask_id is not None, "guidance is for models that denoise"
    in_context = jnp.arange(rows.tokens.shape[1]) < rows.first[:, None]
    return dataclasses.replace(rows, tokens=jnp.where(in_context, mask_id, rows.tokens))
