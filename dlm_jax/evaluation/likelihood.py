"""Likelihood of texts: the exact autoregressive one, and the diffusion bound."""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from dlm_jax.attention.rules import Bidirectional, Causal
from dlm_jax.diffusion.recipes import RECIPES, Recipe
from dlm_jax.errors import UserError
from dlm_jax.losses import Sums, loss_sums
from dlm_jax.mesh import BATCH, pin, spread
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params
from dlm_jax.noise import add_noise

AR = RECIPES["ar"]
TOKENS_A_BATCH = 4096
SHORTEST = 32

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Shows no progress."""


class Likelihood(float):
    """-log p of texts, or its upper bound, in nats a token: a number that knows over how many `tokens` it is the mean.
    """

    tokens: int

    def __new__(cls, nats: float, tokens: int) -> "Likelihood":
        """`nats` is the sum over the predicted tokens."""
        mean = super().__new__(cls, nats / max(tokens, 1))
        mean.tokens = tokens
        return mean

    def __reduce__(self) -> tuple[type, tuple[float, int]]:  # for copy and pickle
        return Likelihood, (self.nats, self.tokens)

    @property
    def nats(self) -> float:
        """The sum over the tokens."""
        return float(self) * self.tokens


def denoising_recipe(card: Card) -> Recipe:
    """The recipe whose loss bounds the likelihood of a model as its card says it denoises: uniform corruption, 1/t.

    A plain autoregressive model is read the way adaptation starts from it: one stream, shifted, everything visible.
    """
    if card.rule == "block_causal":
        return Recipe("nelbo", streams=2, alignment=card.alignment, block_size=card.block_size or 0,
                      clean_half=card.clean_half)
    return Recipe("nelbo", streams=1, alignment=card.alignment)


def likelihood(params: Params, config: ModelConfig, recipe: Recipe, mask_id: int | None,
               rows: Sequence[tuple[np.ndarray, np.ndarray]], samples: int = 1, seed: int = 0,
               progress: Progress = silent) -> Likelihood:
    """-log p of rows of text under a recipe: exact for `AR`, else the NELBO by `samples` noisings of each row.

    rows: pairs (tokens, segments), int [n]; the first token of each document is given, not predicted. Levels are
    stratified over each batch of one length, and the noise is a function of `seed`, so that two models are compared
    under the same noise. progress: called with the rows done so far and their number, over all noisings.
    """
    if samples < 1:
        raise UserError(f"samples must be at least 1, not {samples}")
    key = jax.random.key(seed)
    nats, tokens, done = 0.0, 0, 0
    for number, (batch, segments) in enumerate(batches(list(rows) * samples)):
        sums = _sums(params, jax.random.fold_in(key, number), batch, segments, mask_id, recipe=recipe, config=config)
        nats += float(sums.loss)
        tokens += int(sums.tokens)
        done += int((segments[:, 0] > 0).sum())
        progress(done, samples * len(rows))
    return Likelihood(nats / samples, tokens // samples)


@functools.partial(jax.jit, static_argnames=("recipe", "config"))
def _sums(params: Params, key: jax.Array, tokens: jax.Array, segments: jax.Array, mask_id: int | None, *,
          recipe: Recipe, config: ModelConfig) -> Sums:
    rule = Causal() if recipe.corruption == "none" else Bidirectional()

    def sums(params: Params, key: jax.Array, tokens: jax.Array, segments: jax.Array) -> Sums:
        batch = add_noise(key, pin(tokens, BATCH), pin(segments, BATCH), recipe)
        return loss_sums(params, batch, rule, mask_id, recipe, config)

    return spread(sums, PartitionSpec())(params, key, jnp.asarray(tokens), jnp.asarray(segments))


def batches(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of like length together, padded (segment 0) to a power of two, in few shapes: (tokens, segments) [b, n]."""
    by_length: dict[int, list] = {}
    for row in rows:
        by_length.setdefault(max(SHORTEST, power_of_two(len(row[0]))), []).append(row)
    for length, group in sorted(by_length.items()):
        size = min(max(1, TOKENS_A_BATCH // length), power_of_two(len(group)))
        for start in range(0, len(group), size):
            tokens, segments = np.zeros((2, size, length), np.int32)
            for i, (row, row_segments) in enumerate(group[start:start + size]):
                tokens[i, :len(row)], segments[i, :len(row)] = row, row_segments
            yield tokens, segments


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def texts_to_rows(token_lists: Sequence[Sequence[int]]) -> list[tuple[np.ndarray, np.ndarray]]:
    """One row a text, each one document."""
    return [(np.asarray(tokens, np.int32), np.ones(len(tokens), np.int32)) for tokens in token_lists]
