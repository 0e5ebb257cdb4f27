"""The pictures of a report, as SVG."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from dlm_jax.evaluation.diagnosis import Diagnosis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, GRAY = "#3465a4", "#9a9a94"
STYLE: Any = {"svg.fonttype": "none", "svg.hashsalt": "dlm", "font.family": "sans-serif", "font.size": 10,
         "axes.spines.top": False, "axes.spines.right": False}


def place_chart(diagnosis: Diagnosis) -> str:
    """The loss at each position of a block, or along a text."""
    with matplotlib.rc_context(STYLE):
        figure, axes = canvas(f"Loss by position, {diagnosis.asked}", f"{diagnosis.unit} (from 0)", "nats per token")
        axes.plot(range(len(diagnosis.loss)), diagnosis.loss, "o-", color=BLUE)
        axes.set_ylim(bottom=0)
        return svg(figure)


def calibration_chart(diagnosis: Diagnosis) -> str:
    """How often the most likely token is the true one, against how likely it is said to be."""
    with matplotlib.rc_context(STYLE):
        error = diagnosis.calibration_error
        figure, axes = canvas(f"Calibration, {diagnosis.asked} (expected error {error:.3f})",
                              "probability of the most likely token",
                              "how often it is the true one")
        axes.plot([0, 1], [0, 1], "--", color=GRAY, linewidth=1)
        axes.plot(diagnosis.confidence, diagnosis.accuracy, color=BLUE, linewidth=1)
        shares = diagnosis.count / max(diagnosis.count.max(), 1)
        axes.scatter(diagnosis.confidence, diagnosis.accuracy, s=8 + 120 * shares, color=BLUE)
        axes.set(xlim=(0, 1.02), ylim=(0, 1.02))
        return svg(figure)


def frontier_chart(task: str, values: Mapping[str, Any]) -> str:
    """Quality against tokens per forward pass, a point for each unmasking strategy."""
    points = values["points"]
    with matplotlib.rc_context(STYLE):
        metric = next(iter(next(iter(points.values()))))
        title = f"{task} (AUP {values['aup']:.1f})" if "aup" in values else task
        figure, axes = canvas(title, "tokens per forward pass", metric)
        for name, point in points.items():
            place = point["tokens_per_forward"], point[metric]
            axes.errorbar(*place, yerr=1.96 * stderr(point, metric), fmt="o", color=BLUE, elinewidth=1)
            axes.annotate(name, place, textcoords="offset points", xytext=(6, 5), fontsize=9)
        axes.margins(x=0.2)
        axes.set_xlim(left=0)
        return svg(figure)


def stderr(point: Mapping[str, float], metric: str) -> float:
    """The standard error of a metric; 0 where there is none."""
    name, comma, rest = metric.partition(",")
    return point.get(f"{name}_stderr{comma}{rest}", 0.0)


def canvas(title: str, x: str, y: str) -> tuple[Figure, "Axes"]:
    """An empty chart."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title.replace("$", r"\$"), loc="left", fontsize=11)
    axes.set(xlabel=x, ylabel=y)
    return figure, axes


def svg(figure: Figure) -> str:
    """The figure as an element of a page, the same for the same numbers."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg"):]
