"""Countdown's answers: every one of the authors' is right, and each way to be wrong is found."""

import json

import pytest

from dlm_jax.training.rewards import reaches_target

WRONG = ("44-15=29", "44-15=29,79-29=51", "44-15=28,79-28=51", "79-29=50", "44-15=29,44+15=59", "44-15=29;79-29=50",
         "15,44,79,50", "", "44-15=29,79-29=50,50-0=50", "50=50", "15/44=0,79-29=50")


def test_the_authors_own_answers_are_right(shared):
    for name in ("cd3", "cd4", "cd5"):
        path = shared / "countdown" / f"{name}_test.jsonl"
        if path.exists():
            documents = [json.loads(line) for line in path.read_text().splitlines()]
            assert documents and all(reaches_target(each["input"], each["output"]) for each in documents)


def test_an_answer_may_have_spaces_and_use_numbers_that_it_has_made():
    assert reaches_target("15,44,79,50", " 44 - 15 = 29, 79 - 29 = 50\n")
    assert reaches_target("2,2,3,12", "2+2=4,4*3=12") and reaches_target("8,2,4", "8/2=4")


@pytest.mark.parametrize("answer", WRONG)
def test_a_wrong_answer_is_wrong(answer):
    assert not reaches_target("15,44,79,50", answer)
