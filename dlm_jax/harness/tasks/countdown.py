"""Countdown: reach the last number from the others by arithmetic (Gandhi et al. 2024; Ye et al. 2024 for diffusion)."""

import collections
import re
from typing import Any

EQUATION = re.compile(r"(\d{1,18})([-+*/])(\d{1,18})=(\d{1,18})")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
              "/": lambda a, b: a // b if b and a % b == 0 else None}


def reaches_target(numbers: str, answer: str) -> bool:
    """Whether the equations, such as '44-15=29,79-29=50' for '15,44,79,50', are right, take each number once, theirs or
    one that an equation before has made, and end with the target alone."""
    *given, target = map(int, numbers.split(","))
    left = collections.Counter(given)
    for equation in answer.strip().replace(" ", "").split(","):
        match = EQUATION.fullmatch(equation)
        if match is None:
            return False
        a, operator, b, result = int(match[1]), match[2], int(match[3]), int(match[4])
        left.subtract([a, b])
        if min(left[a], left[b]) < 0 or OPERATIONS[operator](a, b) != result:
            return False
        left[result] += 1
    return list(left.elements()) == [target]


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The harness's grade of one document."""
    return {"acc": float(reaches_target(document["input"], results[0]))}
