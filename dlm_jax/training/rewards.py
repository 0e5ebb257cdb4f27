"""Rewards of answers, by name, for `reinforce.reward`: (prompt, answer, the answer in the data) to a number."""

import collections
import re
from collections.abc import Callable

Reward = Callable[[str, str, str], float]

EQUATION = re.compile(r"(\d{1,18})([-+*/])(\d{1,18})=(\d{1,18})")
OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
              "/": lambda a, b: a // b if b and a % b == 0 else None}


def reaches_target(numbers: str, answer: str) -> bool:
    """Countdown: whether the equations, such as '44-15=29,79-29=50' for '15,44,79,50', are right, take each number
    once, theirs or one that an equation before has made, and end with the target, which is the last number, alone."""
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


REWARDS: dict[str, Reward] = {
    "exact": lambda prompt, answer, reference: float(answer.strip() == reference.strip()),
    "countdown": lambda prompt, answer, reference: float(reaches_target(prompt.strip(), answer)),
}
