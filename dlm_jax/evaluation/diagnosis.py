"""What a model's loss is made of: where in its blocks it arises, and whether the model is as sure as it is right.

Letters: b rows, w tokens of the continuation.
"""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from dlm_jax.evaluation.estimators import by_rows, mask_at_random
from dlm_jax.evaluation.prediction import Denoiser, Rows, predict
from dlm_jax.evaluation.questions import Choice, Scorer, question_key
from dlm_jax.models.weights import Params
from dlm_jax.typing import Array, Bool, Float, Float32, Int, Key, shape_checked

PLACES = 16  # parts of a text where there are no blocks
BINS = 10  # of confidence
FINE = 1000  # bins of confidence, for thresholds
ERRORS = (0.01, 0.02, 0.05, 0.1, 0.2)  # shares of wrong tokens that a threshold is found for
Counts = tuple[np.ndarray, np.ndarray, np.ndarray]  # see `no_counts`


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """A model's loss on texts, apart."""

    asked: str  # how the model was: "left to right" or "as it denoises"
    unit: str  # what the places are: "position in the block", or "sixteenth of the text"
    loss: Float[np.ndarray, " places"]  # nats per token at each place; NaN where there is none
    confidence: Float[np.ndarray, " bins"]  # mean probability of the most likely token, of tokens alike in it
    accuracy: Float[np.ndarray, " bins"]  # how often that is the true one; NaN where there is none
    count: Float[np.ndarray, " bins"]  # predictions
    # For each of `ERRORS`, the lowest threshold of confidence above which at most that share of the predictions is
    # wrong; NaN where there is none. For `--unmasking threshold:TAU`.
    thresholds: Float[np.ndarray, " errors"]

    @property
    def calibration_error(self) -> float:
        """The expected calibration error (Guo et al. 2017): the mean distance of confidence and accuracy."""
        there = self.count > 0
        gaps = np.abs(self.confidence - self.accuracy)[there] * self.count[there]
        return float(gaps.sum() / max(self.count.sum(), 1))


def diagnose(params: Params, model: Denoiser, texts: Sequence[Sequence[int]], draws: int = 8, seed: int = 0
             ) -> Diagnosis:
    """The loss of texts, as tokens, over `draws` noisings of each. An autoregressive model is asked once, left to
    right. Every text needs at least two tokens, of which the first is not predicted.

    Weighted by the tokens at each place, the losses sum to the NELBO or the negative log likelihood.
    """
    scorer = Scorer(params, model, seed=seed)
    numbers = [0] if model.autoregressive else range(draws)
    rows = [(Choice(text[:1], text[1:]), i, draw) for i, text in enumerate(texts) for draw in numbers]
    choices, of_text, draw = zip(*rows)
    keys = jnp.stack([question_key(seed, str(i)) for i in range(len(texts))])[np.array(of_text)]
    found = scorer.each(predicted_tokens, choices, keys, np.array(draw))
    block = None if model.recipe.streams == 1 else model.recipe.block_size
    counts = no_counts(block)
    for choice, tokens in zip(choices, found):
        add(counts, block, *(column[:len(choice.continuation)] for column in tokens))
    return diagnosis_of(counts, block, "left to right" if model.autoregressive else "as it denoises")


def no_counts(block: int | None) -> Counts:
    """Zeros for `add`: by place nats and tokens; by bin of confidence its sum, hits and predictions; and by fine bin
    hits and predictions."""
    return np.zeros((2, block or PLACES)), np.zeros((3, BINS)), np.zeros((2, FINE))


def diagnosis_of(counts: Counts, block: int | None, asked: str) -> Diagnosis:
    """What the counts say."""
    (nats, tokens), (sure, right, count), (hits, predictions) = counts
    with np.errstate(invalid="ignore"):
        return Diagnosis(asked, "position in the block" if block else "sixteenth of the text", nats / tokens,
                         sure / count, right / count, count, thresholds(hits, predictions))


@shape_checked
def thresholds(hits: Float[np.ndarray, " fine"], predictions: Float[np.ndarray, " fine"]
               ) -> Float[np.ndarray, " errors"]:
    """`Diagnosis.thresholds` from what was right and what was predicted in bins of equal width."""
    above = np.cumsum(predictions[::-1])[::-1]
    wrong = np.cumsum((predictions - hits)[::-1])[::-1]
    found = []
    for error in ERRORS:
        good = np.flatnonzero((above > 0) & (wrong <= error * above))
        found.append(good[0] / len(hits) if len(good) else np.nan)
    return np.array(found)


@by_rows
@shape_checked
def predicted_tokens(params: Params, rows: Rows, keys: Key[Array, " b"], draws: Int[Array, " b"], *, model: Denoiser,
                     size: int) -> tuple[Float32[Array, "b w"], Float32[Array, "b w"], Bool[Array, "b w"],
                                         Float32[Array, "b w"]]:
    """Of each token of a draw: the fields of its `Prediction`, and the weight of its loss, 0 where it is visible."""
    if model.autoregressive:
        masked = rows.window(size)[1]
        weight = masked.astype(jnp.float32)
    else:
        masked, weight = mask_at_random(rows, keys, draws, size, model)
    found = predict(params, rows, masked, model, real_tokens=False)
    return found.log_p, found.log_best, found.greedy, weight


def add(counts: Counts, block: int | None, log_p: Float32[np.ndarray, " w"], log_best: Float32[np.ndarray, " w"],
        greedy: Bool[np.ndarray, " w"], weight: Float32[np.ndarray, " w"]) -> None:
    """Adds the tokens of a text to the counts."""
    index, by_place, by_bin, by_fine_bin = np.arange(len(weight)), *counts
    place = (1 + index) % block if block else index * PLACES // len(weight)
    for row, values in zip(by_place, (-weight * log_p, np.ones_like(weight))):
        np.add.at(row, place, values)
    sure, right = np.exp(log_best)[weight > 0], greedy[weight > 0]
    for rows, columns in ((by_bin, (sure, right, np.ones_like(sure))), (by_fine_bin, (right, np.ones_like(sure)))):
        size = rows.shape[1]
        for row, values in zip(rows, columns):
            np.add.at(row, np.minimum((sure * size).astype(int), size - 1), values)
