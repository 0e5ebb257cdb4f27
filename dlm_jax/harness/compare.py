"""Two models on the same documents: whether their difference exceeds noise."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dlm_jax.typing import Float

RESAMPLINGS = 10_000
CONFIDENCE = 0.95


class Difference(NamedTuple):
    """The mean of the first minus that of the second, and its interval over which documents there might have been."""

    difference: float
    low: float
    high: float

    @property
    def exceeds_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return not self.low <= 0 <= self.high


def paired_difference(first: Float[np.ndarray, " n"], second: Float[np.ndarray, " n"], seed: int = 0) -> Difference:
    """The difference of two models' values on the same n documents, with the percentile interval of a paired bootstrap
    (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13; for NLP: Koehn 2004)."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    random = np.random.default_rng(seed)
    # Each resampling draws the documents with replacement: how often each is drawn is multinomial.
    n = len(differences)
    means = [random.multinomial(n, np.full(n, 1 / n)) @ differences / n for _ in range(RESAMPLINGS)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Difference(float(differences.mean()), float(low), float(high))


def compare(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> dict[str, Difference]:
    """The differences of the per-document metrics that both have, from the harness's samples of one task."""
    theirs = {(each["doc_id"], each["filter"]): each for each in second}
    pairs = [(each, theirs[each["doc_id"], each["filter"]]) for each in first]
    found = {}
    for kind in sorted({each["filter"] for each in first}):
        chosen = [pair for pair in pairs if pair[0]["filter"] == kind]
        for metric in chosen[0][0]["metrics"]:
            values = [[each.get(metric) for each in pair] for pair in chosen]
            if all(isinstance(value, (bool, int, float)) for pair in values for value in pair):
                name = metric if kind == "none" else f"{metric},{kind}"
                found[name] = paired_difference(*np.array(values, float).T)
    return found
