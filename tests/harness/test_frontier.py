"""Accuracy under parallelism against sums by hand, and frontiers that the command draws."""

import argparse
import dataclasses
import json
import math

import pytest

from dlm_jax.harness.frontier import aup, strategies


def test_a_model_of_one_point_has_its_rectangle():
    assert aup([(2.0, 0.7)]) == pytest.approx(140)


def test_points_of_equal_accuracy_count_in_full():
    assert aup([(1.0, 0.8), (4.0, 0.8), (2.5, 0.8)]) == pytest.approx(320)


def test_a_point_that_is_worse_loses_weight_and_one_far_below_counts_for_nothing():
    worse = 76 * math.exp(-3 * (1 - 76 / 80))
    assert aup([(1.0, 0.8), (3.0, 0.76)]) == pytest.approx(80 + 2 * (80 + worse) / 2)
    assert aup([(1.0, 0.8), (3.0, 0.76), (9.0, 0.7)]) == aup([(1.0, 0.8), (3.0, 0.76)])


def test_a_better_rival_takes_weight_from_all_but_the_first_point():
    alone, beside = aup([(1.0, 0.5), (2.0, 0.5)]), aup([(1.0, 0.5), (2.0, 0.5)], best=1.0)
    assert alone == pytest.approx(100) and beside == pytest.approx(50 + 50 * math.exp(-1.5))
    assert aup([(1.0, 0.0), (2.0, 0.0)]) == 0


def test_strategies_are_read_with_their_steps():
    assert [tuple(each) for each in strategies("threshold:0.9, confidence@16,confidence+remask:0.3")] == [
        ("threshold:0.9", None), ("confidence", 16), ("confidence+remask:0.3", None)]
    assert str(strategies("confidence@16")[0]) == "confidence@16"


@pytest.mark.parametrize("text", ("", "a,,b", "confidence@0", "confidence@x", "a b"))
def test_what_is_no_list_of_strategies_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="not a list of unmasking strategies"):
        strategies(text)


@pytest.mark.slow
def test_the_command_gives_a_point_for_each_strategy_and_a_report_of_them(tmp_path):
    pytest.importorskip("rouge_score", reason="needs rouge-score: pip install 'dlm-jax[eval]'")
    from dlm_jax import load
    from dlm_jax.commands.main import main
    lm = load("bundled").with_mask()
    dataclasses.replace(lm, spec=dataclasses.replace(lm.spec, rule="bidirectional")).save(tmp_path / "model")
    (tmp_path / "lambada_test_plain_text.txt").write_text("the cat sat on the mat\nthe dog ran up the hill\n")
    flags = ["--tasks", "lambada_infill", "--data", str(tmp_path), "--frontier", "confidence@1,confidence"]
    assert main(["eval", str(tmp_path / "model"), *flags, "--out", str(tmp_path / "report")]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    points = report["results"]["lambada_infill"]["points"]
    assert points["confidence"]["tokens_per_forward"] == 1 < points["confidence@1"]["tokens_per_forward"]
    assert (tmp_path / "report" / "report.html").read_text().count("<svg") == 1
