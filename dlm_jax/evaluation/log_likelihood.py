"""The log likelihood of texts: exact for autoregressive models, and bounded for diffusion models.

Letters: b rows of a batch, n tokens.
"""

import functools
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
from dlm_jax.objective.loss import LossSums, loss_sums
from dlm_jax.parallel.mesh import BATCH_AXES, auto_sharded, constrain
from dlm_jax.typing import Array, Int, Key, Segments, Tokens

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
    tokens it averages over (`tokens`) and their sum (`nats`), so results can be pooled.
    """

    tokens: int

    def __new__(cls, nats: float, tokens: int) -> "Likelihood":
        """The mean of `nats`, a sum over `tokens` predicted tokens; 0 if there are none."""
        mean = super().__new__(cls, nats / max(tokens, 1))
        mean.tokens = tokens
        return mean

    def __reduce__(self) -> tuple[type, tuple[float, int]]:  # `float` alone would copy and pickle without `tokens`
        return Likelihood, (self.nats, self.tokens)

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
    nats, tokens, done = 0.0, 0, 0
    for index, (batch, segments) in enumerate(batches(list(rows) * mc_samples)):
        sums = batch_loss(params, jax.random.fold_in(key, index), batch, segments, mask_id, recipe=recipe,
                          config=config)
        nats += float(sums.loss)
        tokens += int(sums.target_count)
        done += int((segments[:, 0] > 0).sum())
        progress(done, mc_samples * len(rows))
    return Likelihood(nats / mc_samples, tokens // mc_samples)


@functools.partial(jax.jit, static_argnames=("recipe", "config"))
def batch_loss(params: Params, key: Key[Array, ""], tokens: Tokens, segments: Segments, mask_id: int | None, *,
               recipe: Recipe, config: ModelConfig) -> LossSums:
    """The loss of one noising of a batch, as sums over its tokens, in nats."""
    rule = training_rule(recipe, tokens.shape[1])

    def sums(params: Params, key: jax.Array, tokens: jax.Array, segments: jax.Array) -> LossSums:
        batch = add_noise(key, constrain(tokens, BATCH_AXES), constrain(segments, BATCH_AXES), recipe)
        return loss_sums(params, batch, rule, mask_id, recipe, config)

    return auto_sharded(sums, PartitionSpec())(params, key, jnp.asarray(tokens), jnp.asarray(segments))


def batches(rows: Sequence[Row]) -> Iterator[tuple[Tokens, Segments]]:
    """Batches of rows of similar length, in few shapes: rows are padded (segment 0) to a power of two of at least
    `MIN_ROW_LENGTH`, and batches hold at most `TOKENS_PER_BATCH` tokens, padding included, or one row."""
    by_length: dict[int, list[Row]] = {}
    for row in rows:
        by_length.setdefault(max(MIN_ROW_LENGTH, next_power_of_two(len(row[0]))), []).append(row)
    for length, group in sorted(by_length.items()):
        size = min(max(1, TOKENS_PER_BATCH // length), next_power_of_two(len(group)))
        for start in range(0, len(group), size):
            batch = np.zeros((2, size, length), np.int32)
            for i, (tokens, segments) in enumerate(group[start:start + size]):
                batch[0, i, :len(tokens)], batch[1, i, :len(tokens)] = tokens, segments
            yield batch[0], batch[1]


def texts_to_rows(token_lists: Sequence[Sequence[int]]) -> list[Row]:
    """One row, of one document, per text."""
    return [(np.asarray(tokens, np.int32), np.ones(len(tokens), np.int32)) for tokens in token_lists]
