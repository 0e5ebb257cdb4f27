"""Quality against tokens per forward pass: what faster decoding costs, and that in one number."""

import argparse
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

ALPHA = 3.0  # how fast a point loses its weight with its accuracy
TOLERATED = 5.0  # percentage points below the slowest point's accuracy; what is worse does not count
STRATEGY = re.compile(r"([^@,\s]+)(?:@([1-9]\d{0,8}))?")


class Strategy(NamedTuple):
    """How the sampler decodes at one point of a frontier."""

    unmasking: str
    steps: int | None  # the budget of forward passes for a text; None for the default

    def __str__(self) -> str:
        return self.unmasking if self.steps is None else f"{self.unmasking}@{self.steps}"


def strategies(text: str) -> list[Strategy]:
    """An argument type: 'confidence@16,threshold:0.9' as strategies."""
    matches = [STRATEGY.fullmatch(part.strip()) for part in text.split(",")]
    found = [Strategy(match[1], int(match[2]) if match[2] else None) for match in matches if match]
    if len(found) < len(matches):
        raise argparse.ArgumentTypeError(f"'{text}' is not a list of unmasking strategies, with @STEPS where they "
                                         "take a number of steps, such as threshold:0.9,threshold:0.7,confidence@32")
    return list(dict.fromkeys(found))


def aup(points: Sequence[tuple[float, float]], best: float | None = None) -> float:
    """Accuracy under parallelism of (tokens per forward, accuracy from 0 to 1) of one model (d3LLM, arXiv 2601.07568):

        AUP = rho_1 y_1 + sum over i > 1 of (rho_i - rho_i-1) (y_i W(y_i) + y_i-1 W(y_i-1)) / 2
        W(y) = min(1, exp(-ALPHA (1 - y / best)))

    over the points in the order of rho, tokens per forward, with y, the accuracy in percent, at most TOLERATED below
    that of the first. best: the highest accuracy of all models compared, from 0 to 1; default: of these points.
    """
    ordered = sorted((rho, 100 * y) for rho, y in points)
    kept = [(rho, y) for rho, y in ordered if y >= ordered[0][1] - TOLERATED]
    top = max(y for _, y in ordered) if best is None else 100 * best

    def weighted(y: float) -> float:
        return y * min(1.0, math.exp(-ALPHA * (1 - y / top))) if top else 0.0

    areas = [(rho - before) * (weighted(y) + weighted(y_before)) / 2
             for (before, y_before), (rho, y) in zip(kept, kept[1:])]
    return kept[0][0] * kept[0][1] + math.fsum(areas)
