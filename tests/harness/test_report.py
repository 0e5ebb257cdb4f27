"""The report: its numbers are those of the command, its page needs nothing else, and no name gets out of its cell."""

import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'dlm-jax[eval]'")

from dlm_jax.commands.main import main
from dlm_jax.evaluation.diagnosis import Diagnosis
from dlm_jax.harness.charts import calibration_chart, frontier_chart, place_chart
from dlm_jax.harness.report import write_report

FACTS = {"model": "runs/<b>|x`", "weights (SHA-256)": "f" * 64, "seed": "0", "date": "2026-01-01"}
RESULTS = {"piqa_local": {"acc": 0.5, "acc_stderr": 0.1}, "nelbo": {"nats_per_token": 4.0, "standard_error": 0.5},
           "gsm8k_local": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.05}}
DIAGNOSIS = Diagnosis("as it denoises", "position in the block", np.array([1.0, np.nan, 3.0]), np.array([0.1, 0.9]),
                      np.array([0.2, 0.8]), np.array([3.0, 7.0]), np.array([np.nan, 0.9, 0.8, 0.5, 0]))


@pytest.fixture
def written(tmp_path):
    write_report(tmp_path / "report", FACTS, RESULTS, DIAGNOSIS)
    return tmp_path / "report"


def test_every_number_has_its_interval(written):
    text = (written / "report.md").read_text()
    assert "| piqa\\_local | acc | 0.5 | 0.304 to 0.696 |" in text
    assert "| nelbo | nats\\_per\\_token | 4 | 3.02 to 4.98 |" in text
    assert "| gsm8k\\_local | exact\\_match,strict-match | 0.25 | 0.152 to 0.348 |" in text


def test_the_json_is_strict_and_says_what_the_figures_depend_on(written):
    report = json.loads((written / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert report["results"] == RESULTS and report["weights (SHA-256)"] == "f" * 64
    assert report["diagnosis"]["loss"] == [1.0, None, 3.0]
    assert report["diagnosis"]["calibration_error"] == pytest.approx(0.1)
    assert report["diagnosis"]["thresholds"] == {"0.01": None, "0.02": 0.9, "0.05": 0.8, "0.1": 0.5, "0.2": 0}


def test_a_model_that_denoises_gets_the_thresholds_for_its_errors(written):
    text = (written / "report.md").read_text()
    assert "| threshold | at most 5% wrong above it | 0.8 |  |" in text and "at most 1% wrong" not in text


def test_the_page_needs_nothing_else_and_names_stay_text(written):
    text = (written / "report.html").read_text()
    assert text.count("<svg") == 2 and "{{" not in text and "<b>" not in text and "runs/&lt;b&gt;" in text
    assert not re.search(r'(src|href)="(?!#)', text) and "@import" not in text
    assert "| model | runs/\\<b\\>\\|x\\` |" in (written / "report.md").read_text()


def test_charts_are_well_formed_and_the_same_for_the_same_numbers():
    frontier = {"aup": 95.0, "points": {"threshold:0.9": {"acc": 0.5, "acc_stderr": 0.1, "tokens_per_forward": 2.0},
                                        "a_$b": {"acc": 0.4, "tokens_per_forward": 3.0}}}
    for draw in (lambda: place_chart(DIAGNOSIS), lambda: calibration_chart(DIAGNOSIS),
                 lambda: frontier_chart("countdown_$x<y", frontier)):
        ElementTree.fromstring(draw())
        assert draw() == draw()
    assert "threshold:0.9" in frontier_chart("task", frontier) and "AUP 95.0" in frontier_chart("task", frontier)


def test_the_command_writes_the_report_of_texts(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("def main():\n    return 0\n" * 20)
    flags = ["--tasks", "ar_nll", "--text", str(tmp_path / "a.txt"), "--out", str(tmp_path / "report"), "--json"]
    assert main(["eval", "bundled", *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["results"]["ar_nll"]["nats_per_token"] == found["nats_per_token"]
    assert np.mean([loss for loss in report["diagnosis"]["loss"]]) == pytest.approx(found["nats_per_token"], rel=0.1)


@pytest.mark.parametrize("flags,said", (
    (["--tasks", "nelbo", "--text", "a.txt", "--frontier", "confidence"], "--frontier compares ways to generate"),
    (["--tasks", "countdown_local", "--frontier", "a b"], "not a list of unmasking strategies")))
def test_a_frontier_of_what_does_not_generate_is_refused(flags, said, capsys):
    assert main(["eval", "bundled", *flags]) == 2
    assert said in capsys.readouterr().err
