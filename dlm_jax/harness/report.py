"""The report of an evaluation: what was measured, of what, and how, as JSON, Markdown and a page with pictures."""

import dataclasses
import datetime
import html
import json
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from dlm_jax import __version__
from dlm_jax.convert.origin import weights_sha256
from dlm_jax.evaluation.diagnosis import ERRORS, Diagnosis
from dlm_jax.files import write_text
from dlm_jax.harness.charts import calibration_chart, frontier_chart, place_chart, stderr
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.weights import parameter_count
from dlm_jax.sampling.settings import Settings

TEMPLATE = Path(__file__).parent.parent / "assets" / "report.html"
NORMAL_95 = 1.96  # standard errors to either side of a mean
Row = tuple[str, str, float, str]  # task, metric, value, 95 % interval


def facts_of(lm: LanguageModel, name: str, settings: Settings) -> dict[str, str]:
    """What every figure of a report depends on: names and values."""
    spec = {key: value for key, value in dataclasses.asdict(lm.spec).items() if value is not None}
    return {
        "model": name,
        "weights (SHA-256)": weights_sha256(Bundle(lm.config, lm.params, lm.spec)),
        "architecture": f"{lm.config.family}, {parameter_count(lm.config):,} parameters",
        "denoising": ", ".join(f"{key} {value}" for key, value in spec.items()),
        "sampler": ", ".join(f"{key} {value}" for key, value in dataclasses.asdict(settings).items()),
        "seed": str(settings.seed),
        "command": shlex.join(["dlm", *sys.argv[1:]]),
        "versions": f"dlm-jax {__version__}, jax {jax.__version__}, Python {platform.python_version()}",
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "date": datetime.date.today().isoformat(),
    }


def write_report(out: Path, facts: Mapping[str, str], results: Mapping[str, Any], diagnosis: Diagnosis | None) -> None:
    """Writes `report.json`, `report.md` and `report.html` into the directory `out`, new or not.

    results: as `dlm eval --json` prints them, by task. diagnosis: of the texts of its likelihoods, if there were any.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = {} if diagnosis is None else as_json(diagnosis)
    fields = {**facts, "results": results, **({"diagnosis": known} if known else {})}
    write_text(out / "report.json", json.dumps(fields, indent=2) + "\n")
    rows = [*rows_of(results), *threshold_rows(diagnosis)]
    write_text(out / "report.md", markdown(facts, rows))
    short = f"{facts['model']} ({facts['weights (SHA-256)'][:12]}), seed {facts['seed']}, {facts['date']}"
    figures = [] if diagnosis is None else [place_chart(diagnosis), calibration_chart(diagnosis)]
    figures += [frontier_chart(task, values) for task, values in results.items() if "points" in values]
    write_text(out / "report.html", page(facts, rows, [(figure, short) for figure in figures]))


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """The fields, with null where there is no number."""
    found = {name: value if isinstance(value, str) else [None if x != x else float(x) for x in value]
             for name, value in vars(diagnosis).items()}
    thresholds = dict(zip(map(str, ERRORS), found["thresholds"]))
    return {**found, "thresholds": thresholds, "calibration_error": diagnosis.calibration_error}


def threshold_rows(diagnosis: Diagnosis | None) -> Iterator[Row]:
    """The thresholds of confidence of a model that denoises, for `--unmasking threshold:TAU`."""
    if diagnosis is not None and diagnosis.asked == "as it denoises":
        for error, threshold in zip(ERRORS, diagnosis.thresholds):
            if threshold == threshold:
                yield "threshold", f"at most {error:.0%} wrong above it", float(threshold), ""


def rows_of(results: Mapping[str, Any], task: str = "") -> Iterator[Row]:
    """The rows of the table: one for each number that is no standard error."""
    for name, value in results.items():
        if isinstance(value, Mapping):
            yield from rows_of(value, f"{task} {name}".strip())
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and "stderr" not in name and (
                name != "standard_error"):
            error = standard_error(results, name)
            yield task, name, value, "" if error is None else (
                f"{value - NORMAL_95 * error:.4g} to {value + NORMAL_95 * error:.4g}")


def standard_error(metrics: Mapping[str, Any], name: str) -> float | None:
    """The standard error that stands beside a metric, under the harness's name for it or ours."""
    found = metrics.get("standard_error") if name == "nats_per_token" else stderr(metrics, name)
    return found or None


def markdown(facts: Mapping[str, str], rows: Sequence[Row]) -> str:
    """The report as Markdown."""
    table = [f"| {cell(task)} | {cell(metric)} | {value:.4g} | {interval} |" for task, metric, value, interval in rows]
    known = [f"| {name} | {cell(value)} |" for name, value in facts.items()]
    return "\n".join(["# Evaluation", "", "| task | metric | value | 95 % interval |", "|---|---|---:|---|", *table, "",
                      "| | |", "|---|---|", *known, ""])


def cell(text: str) -> str:
    """A text as the cell of a Markdown table, as it is and on one line."""
    return " ".join("".join(f"\\{c}" if c in "\\`*_{}[]<>|" else c for c in text).split())


def page(facts: Mapping[str, str], rows: Sequence[Row], figures: Sequence[tuple[str, str]]) -> str:
    """The report as a page that needs nothing else."""
    table = "".join(f"<tr><td>{html.escape(task)}</td><td>{html.escape(metric)}</td><td>{value:.4g}</td>"
                    f"<td>{interval}</td></tr>" for task, metric, value, interval in rows)
    drawn = "".join(f"<figure>{svg}<figcaption>{html.escape(caption)}</figcaption></figure>"
                    for svg, caption in figures)
    known = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    text = TEMPLATE.read_text(encoding="utf-8")
    for name, filled in (("title", html.escape(facts["model"])), ("table", table), ("figures", drawn),
                         ("facts", known)):
        text = text.replace("{{" + name + "}}", filled)
    return text
