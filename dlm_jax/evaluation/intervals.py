"""How far Monte Carlo estimates may be from what they estimate.

Draws come in rounds in which noise levels are stratified (`estimators.draw_noise`). Neighbouring draws are pairs whose
difference measures the noise that stratification leaves: the variance of "collapsed strata" (Cochran, Sampling
Techniques, section 5A.12), which is never too small on average.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy import stats

from dlm_jax.typing import Float


class Estimate(NamedTuple):
    """A mean over draws, with its standard error."""

    mean: float
    error: float  # standard error of the mean; 0 for an exact value
    freedom: float  # degrees of freedom of the error

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The two-sided interval of Student's t that covers the expectation with this probability."""
        half = self.error and stats.t.ppf((1 + confidence) / 2, self.freedom) * self.error
        return self.mean - half, self.mean + half


def estimate(draws: Float[np.ndarray, "*x draws"]) -> Estimate:
    """The sum over everything but the draws, of their means over an even number of draws.

    The draws of one text are independent of those of another, so variances add up; the degrees of freedom of their sum
    are Satterthwaite's.
    """
    rows = np.asarray(draws, np.float64).reshape(-1, draws.shape[-1])
    pairs = rows.shape[1] // 2
    variances = np.sum((rows[:, ::2] - rows[:, 1::2])**2, 1) / (2 * pairs)**2
    total = math.fsum(variances)
    freedom = pairs * total**2 / math.fsum(variances**2) if total else math.inf
    return Estimate(math.fsum(rows.mean(1)), math.sqrt(total), freedom)
