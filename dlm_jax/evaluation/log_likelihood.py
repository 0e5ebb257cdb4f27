"""The log likelihood of texts: exact for autoregressive models, and bounded for diffusion models.

Letters: b rows of a batch, n tokens.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dlm_jax.attention.visibility import training_rule
from dlm_jax.diffusion.noise import add_noise
from dlm_jax.diffusion.recipes import RECIPES, Recipe
from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.padding import next_power_of_two
from dlm_jax.models.weights import Params
from dlm_jax.objective.loss import target_hidden
from dlm_jax.objective.sharded_cross_entropy import sharded_cross_entropy
from dlm_jax.parallel.mesh import BATCH_AXES, auto_sharded, constrain
from dlm_jax.typing import Array, Float, Float32, Int, Key, Segments, Tokens

AR = RECIPES["ar"]
TOKENS_PER_BATCH = 4096
MIN_ROW_LENGTH = 32

Row = tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]  # tokens, and their segments: see `dlm_jax.segments`
ProgressFn = Callable[[int, int], None]  # called with how many are done, and how many there are


def silent(done: int, total: int) -> None:
    """Shows no progress."""


class Likelihood(float):
    """-log p of texts, or its upper bound, in nats per token.

    A float, so that it compares, formats and serializes as the mean it is. It also carries the number of predicted
    tokens it averages over (`tokens`) and their sum (`nats`), so results can be pooled, and how far Monte Carlo may
    have led it from the expectation (`error`).
    """

    tokens: int
    error: float  # standard error of the mean over the noise: 0 for an exact value, NaN after a single draw

    def __new__(cls, nats: float, tokens: int, error: float = 0.0) -> "Likelihood":
        """The mean of `nats`, a sum over `tokens` predicted tokens; 0 if there are none."""
        mean = super().__new__(cls, nats / max(tokens, 1))
        mean.tokens, mean.error = tokens, error
        return mean

    def __reduce__(self) -> tuple[type, tuple[float, int, float]]:  # `float` alone would copy and pickle without them
        return Likelihood, (self.nats, self.tokens, self.error)

    @property
    def nats(self) -> float:
        """The sum over the tokens."""
        return float(self) * self.tokens


def denoising_recipe(spec: DiffusionSpec) -> Recipe:
    """The recipe whose loss bounds -log p of a model that denoises as its spec states: uniform corruption, weight 1/t
    (the NELBO of MDLM, arXiv 2406.07524).

    A plain autoregressive model is treated as adaptation starts from it: one stream, shifted, full visibility.
    """
    if spec.rule == "block_causal":
        return Recipe("nelbo", streams=2, alignment=spec.alignment, block_size=spec.block_size or 0,
                      clean_half=spec.clean_half)
    return Recipe("nelbo", streams=1, alignment=spec.alignment)


def likelihood(params: Params, config: ModelConfig, recipe: Recipe, mask_id: int | None, rows: Sequence[Row],
               mc_samples: int = 1, seed: int = 0, progress: ProgressFn = silent) -> Likelihood:
    """-log p of rows of text under a recipe, in nats per token: exact for `AR`, otherwise the NELBO.

    rows: pairs (tokens, segments), int [n]. The first token of each document is conditioned on, not predicted.
    mc_samples: Monte Carlo samples, that is noisings of each row that the NELBO averages over. Noise levels are
    stratified over each batch of rows of similar length, and the noise is a function of `seed`, so two models can be
    compared under the same noise. progress: counts rows, once per noising.

    Raises `UserError` for mc_samples below 1.
    """
    if mc_samples < 1:
        raise UserError(f"mc_samples must be at least 1, not {mc_samples}")
    key = jax.random.key(seed)
    nats, tokens, done = np.zeros((mc_samples, len(rows))), 0, 0
    for number, (indices, batch, segments) in enumerate(batches(list(rows) * mc_samples)):
        found, targets = row_losses(params, jax.random.fold_in(key, number), batch, segments, mask_id, recipe=recipe,
                                    config=config)
        nats.flat[indices] = np.asarray(found)[:len(indices)]
        tokens += int(targets)
        done += len(indices)
        progress(done, nats.size)
    count = tokens // mc_samples
    return Likelihood(nats.sum() / mc_samples, count, standard_error(nats, recipe) / max(count, 1))


def standard_error(nats: Float[np.ndarray, "samples rows"], recipe: Recipe) -> float:
    """The standard error of the sum over the rows of their means over the samples. Levels are stratified among the rows
    of a batch, so it is rather too large than too small."""
    if recipe.corruption == "none":
        return 0.0
    return float(np.sqrt(np.sum(np.var(nats, 0, ddof=1)) / len(nats))) if len(nats) > 1 else math.nan


@functools.partial(jax.jit, static_argnames=("recipe", "config"))
def row_losses(params: Params, key: Key[Array, ""], tokens: Tokens, segments: Segments, mask_id: int | None, *,
               recipe: Recipe, config: ModelConfig) -> tuple[Float32[Array, " b"], Int[Array, ""]]:
    """The loss of one noising of a batch, in nats, as sums over each row, and the number of predicted tokens."""
    rule = training_rule(recipe, tokens.shape[1])

    def sums(params: Params, key: jax.Array, tokens: jax.Array, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
        batch = add_noise(key, constrain(tokens, BATCH_AXES), constrain(segments, BATCH_AXES), recipe)
        hidden = target_hidden(params, batch, rule, mask_id, recipe, config)
        each = jnp.eye(len(tokens))[:, :, None] * batch.weight  # rows, b, n
        return sharded_cross_entropy(params, hidden, batch.tokens, each, config), jnp.sum(batch.targets)

    return auto_sharded(sums, PartitionSpec())(params, key, jnp.asarray(tokens), jnp.asarray(segments))


def batches(rows: Sequence[Row]) -> Iterator[tuple[list[int], Tokens, Segments]]:
    """Batches of rows of similar length, in few shapes, with the indices of their rows: rows are padded (segment 0) to
    a power of two of at least `MIN_ROW_LENGTH`, and batches hold at most `TOKENS_PER_BATCH` tokens, padding included,
    or one row."""
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        by_length.setdefault(max(MIN_ROW_LENGTH, next_power_of_two(len(row[0]))), []).append(index)
    for length, group in sorted(by_length.items()):
        size = min(max(1, TOKENS_PER_BATCH // length), next_power_of_two(len(group)))
        for start in range(0, len(group), size):
            indices, batch = group[start:start + size], np.zeros((2, size, length), np.int32)
            for i, (tokens, segments) in enumerate(rows[index] for index in indices):
                batch[0, i, :len(tokens)], batch[1, i, :len(tokens)] = tokens, segments
            yield indices, batch[0], batch[1]


def texts_to_rows(token_lists: Sequence[Sequence[int]]) -> list[Row]:
    """One row, of one document, per text."""
    return [(np.asarray(tokens, np.int32), np.ones(len(tokens), np.int32)) for tokens in token_lists]
