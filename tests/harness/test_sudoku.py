"""Sudoku's answers: a grid that is right is, and one that is off by a digit, a row or a box is not."""

import pytest

from dlm_jax.harness.tasks.sudoku import solves

PUZZLE = "0321\n0000\n0030\n1002"
NINE = ["534678912", "672195348", "198342567", "859761423", "426853791", "713924856", "961537284", "287419635",
        "345286179"]
WRONG = ("4321\n1243\n2134\n3412\n1", "4321\n1234\n2134\n1342", "4321\n1243\n2134\n1412", "0321\n1243\n2134\n3412",
         "4321\n3412\n2143\n1234", "5321\n1243\n2134\n3412", "432a\n1243\n2134\n3412", "")


def test_a_right_grid_is_right_however_it_is_spaced():
    puzzle = "0321\n0000\n0030\n0002"
    assert solves(puzzle, "4321\n1243\n2134\n3412")
    assert solves(puzzle, " 4 3 2 1\n1243 2134 3412 ")
    assert solves("0" * 81, "\n".join(NINE))


@pytest.mark.parametrize("answer", WRONG)
def test_a_wrong_grid_is_wrong(answer):
    assert not solves(PUZZLE, answer)


def test_rows_and_columns_are_not_enough():
    latin = ["1234", "2341", "3412", "4123"]  # right but for its boxes
    assert not solves("0" * 16, "".join(latin))


@pytest.mark.parametrize("puzzle", ("", "0" * 25, "x" * 16))
def test_what_is_no_puzzle_has_no_solution(puzzle):
    assert not solves(puzzle, "1" * len(puzzle))
