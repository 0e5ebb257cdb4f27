"""Sudoku: each row, column and box of a grid holds every digit once (as Ye et al. 2024 set it for diffusion)."""

import math
from typing import Any


def solves(puzzle: str, answer: str) -> bool:
    """Whether `answer` is a full grid that keeps the digits of `puzzle`, of 4 by 4 or 9 by 9 cells, and holds 1 to 4 or
    1 to 9 once in every row, column and box. Open cells of the puzzle are 0; space and line breaks do not count."""
    given, filled = ("".join(text.split()) for text in (puzzle, answer))
    n = math.isqrt(len(given))
    if n not in (4, 9) or not len(given) == len(filled) == n * n or not (given + filled).isdecimal():
        return False
    if any(a not in ("0", b) for a, b in zip(given, filled)):
        return False
    box, cells = math.isqrt(n), range(n)
    rows = [filled[n * i:n * (i + 1)] for i in cells]
    columns = [filled[i::n] for i in cells]
    boxes = ["".join(rows[i // box * box + k][i % box * box:][:box] for k in range(box)) for i in cells]
    digits = [str(1 + i) for i in cells]
    return all(sorted(group) == digits for group in (*rows, *columns, *boxes))


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The harness's grade of one document."""
    return {"acc": float(solves(document["input"], results[0]))}
