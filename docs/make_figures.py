"""Draws docs/figures/*.svg from the code itself: masks from the rules, curves from corruption and schedules.

    python docs/make_figures.py [--compiled]

With `--compiled` also those that need the TPU compiler, which takes a minute or two. A test asserts that the others
are up to date.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.aot import timeline
from dlm_jax.aot.program import read_program
from dlm_jax.aot.report import compile_step, shape_of
from dlm_jax.aot.topology import devices
from dlm_jax.attention import dense_mask
from dlm_jax.attention.rules import Annealed, Bidirectional, BlockCausal, BlockDiffusion, Causal, Rule
from dlm_jax.config import load_config
from dlm_jax.diffusion.corruption import exact_count, position_dependent
from dlm_jax.diffusion.schedule import cosine, linear

OUT = Path(__file__).with_name("figures")
CELL, GAP, MARGIN = 14, 46, 30  # pixels
INK, PALE, GRID = "#3949ab", "#e8eaf6", "#c5cae9"
LINES = ("#c5cae9", "#7986cb", "#3949ab", "#1a237e")  # from pale to dark
TOKENS, BLOCK = 12, 4


class Drawing(NamedTuple):
    """SVG elements and the room they take."""

    elements: list[str]
    width: float
    height: float


def text(x: float, y: float, words: str, anchor: str = "start", bold: bool = False) -> str:
    """A line of text."""
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{weight}>{words}</text>'


def upright(x: float, y: float, words: str) -> str:
    """A line of text that is read from below, centered."""
    return f'<g transform="translate({x:g} {y:g}) rotate(-90)">{text(0, 0, words, "middle")}</g>'


def shifted(drawing: Drawing, x: float) -> Drawing:
    """A drawing with room to its left."""
    elements = [f'<g transform="translate({x:g} 0)">', *drawing.elements, "</g>"]
    return Drawing(elements, drawing.width + x, drawing.height)


def svg(drawing: Drawing, description: str) -> str:
    """The file of a drawing, on white so that it can be read on a dark page."""
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {drawing.width:g} {drawing.height:g}" role="img" '
            f'aria-label="{description}" font-family="sans-serif" font-size="12" fill="#222">')
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *drawing.elements, "</svg>", ""])


def line(path: str, color: str, width: float = 1) -> str:
    """A line along a path."""
    return f'<path d="{path}" stroke="{color}" stroke-width="{width:g}"/>'


def mask_panel(title: str, mask: np.ndarray, blocks: int) -> Drawing:
    """A mask [queries, keys]: a dark cell where the query of the row sees the key of the column."""
    n, m = mask.shape
    cells = [f'<rect x="{k * CELL}" y="{q * CELL + 20}" width="{CELL - 1}" height="{CELL - 1}" '
             f'fill="{INK if mask[q, k] else PALE}"/>' for q in range(n) for k in range(m)]
    cuts = [line(f"M{i * CELL - 0.5} 20v{n * CELL}M0 {i * CELL + 19.5}h{m * CELL}", "white", 3)
            for i in range(blocks, m, blocks)] if blocks else []
    return Drawing([text(0, 12, title, bold=True), *cells, *cuts], m * CELL, n * CELL + 20)


def side_by_side(panels: Sequence[Drawing], columns: int) -> Drawing:
    """Panels in rows of `columns`."""
    elements, x, y, right = [], float(MARGIN), float(MARGIN) - 10, 0.0
    for i, panel in enumerate(panels):
        if i and i % columns == 0:
            x, y = MARGIN, y + max(p.height for p in panels[i - columns:i]) + 28
        elements += [f'<g transform="translate({x:g} {y:g})">', *panel.elements, "</g>"]
        x += panel.width + GAP
        right = max(right, x)
    last = panels[(len(panels) - 1) // columns * columns:]
    return Drawing(elements, right - GAP + MARGIN, y + max(p.height for p in last) + 20)


def seen(rule: Rule, length: int = TOKENS) -> np.ndarray:
    """The mask of a rule as bool [queries, keys]."""
    return np.asarray(dense_mask(rule, length)[0])


def one_stream() -> str:
    """The masks of models that read one stream, with annealing half way."""
    half_open = Annealed(jnp.float32(0.5), jnp.uint32(3))
    return svg(side_by_side([mask_panel("causal", seen(Causal()), 0),
                             mask_panel("annealed, half open", seen(half_open), 0),
                             mask_panel("bidirectional", seen(Bidirectional()), 0),
                             mask_panel("block-causal", seen(BlockCausal(BLOCK)), BLOCK)], 4),
               "causal, annealed, bidirectional and block-causal masks of 12 tokens")


def two_streams() -> str:
    """The masks of training on [noisy | clean]."""
    panels = []
    for clean_half, title in (("block_causal", "clean half by blocks"), ("token_causal", "clean half token by token")):
        panel = mask_panel(title, seen(BlockDiffusion(TOKENS, BLOCK, clean_half), 2 * TOKENS), BLOCK)
        middle, end = TOKENS * CELL, panel.height
        cut = line(f"M{middle - 0.5} 20V{end}M0 {middle + 19.5}H{panel.width}", "#e53935", 2)
        names = [text(middle / 2, end + 16, "noisy keys", "middle"),
                 text(middle * 1.5, end + 16, "clean keys", "middle"),
                 upright(-8, 20 + middle / 2, "noisy queries"), upright(-8, 20 + middle * 1.5, "clean queries")]
        panels.append(Drawing([*panel.elements, cut, *names], panel.width, end + 16))
    return svg(side_by_side(panels, 2), "two-stream masks of 12 noisy and 12 clean tokens in blocks of 4")


def curve_panel(title: str, xs: np.ndarray, curves: dict[str, np.ndarray], across: str, up: str) -> Drawing:
    """Curves of values in [0, 1]."""
    width, height = 260, 170

    def at(x: float, y: float) -> str:
        return f"{(x - xs[0]) / (xs[-1] - xs[0]) * width:.1f},{20 + (1 - y) * height:.1f}"

    grid = [line(f"M0 {20 + height * (1 - y):g}h{width}", GRID) + text(-6, 24 + height * (1 - y), f"{y:g}", "end")
            for y in (0, 0.5, 1)]
    drawn = [f'<polyline fill="none" stroke="{color}" stroke-width="2.5" points="'
             f'{" ".join(at(x, y) for x, y in zip(xs, ys))}"/>' for color, ys in zip(LINES, curves.values())]
    legend = [f'<rect x="{width + 14}" y="{30 + 18 * i}" width="14" height="4" fill="{color}"/>'
              + text(width + 34, 36 + 18 * i, name) for i, (color, name) in enumerate(zip(LINES, curves))]
    ends = [text(0, 38 + height, f"{xs[0]:g}"), text(width, 38 + height, f"{xs[-1]:g}", "end"),
            text(width / 2, 38 + height, across, "middle")]
    elements = [text(0, 10, title, bold=True), *grid, *drawn, *legend, *ends, upright(-30, 20 + height / 2, up)]
    return shifted(Drawing(elements, width + 110, height + 40), 24)


def share_masked(half_life: float, levels: Sequence[float], block: int = 16, draws: int = 4096
                 ) -> dict[str, np.ndarray]:
    """How often each position of a block is masked, over many draws; rounded, so that the file does not depend on the
    machine."""
    offsets = jnp.broadcast_to(jnp.arange(block), (draws, block))
    found = {}
    for t in levels:
        level = jnp.full((draws, block), t)
        mask = (exact_count(jax.random.key(0), level, offsets) if half_life == 0
                else position_dependent(jax.random.key(0), level, offsets, block, half_life))
        found[f"t = {t:g}"] = np.asarray(mask.mean(0)).round(2)
    return found


def position_dependence() -> str:
    """What position-dependent masking does to a block of 16, beside exact counts without it."""
    levels, xs = (0.1, 0.3, 0.5, 0.8), np.arange(16)
    panels = [curve_panel(title, xs, share_masked(half_life, levels), "position in the block", "share masked")
              for half_life, title in ((0.0, "the same everywhere"), (0.1, "position-dependent, half-life 0.1"))]
    return svg(side_by_side(panels, 2), "how often each position of a block is masked at four levels")


def unmasking_schedules() -> str:
    """What is still masked after each part of the steps, for an equal number per step and for the cosine."""
    xs = np.linspace(0, 1, 33)
    curves = {schedule.__name__: np.asarray(schedule(jnp.asarray(xs))).round(3) for schedule in (linear, cosine)}
    panel = curve_panel("what is still masked", xs, curves, "part of the steps", "part of the text")
    return svg(side_by_side([panel], 1), "the linear and the cosine unmasking schedule")


def layer() -> str:
    """A layer of DiffuLLaMA 7B on 64 v5p chips over time, forward and backward, by the compiler's schedule."""
    config = load_config("diffullama_7b", ["model.remat=save_projections", "train.grad_accum_steps=16"])
    found = devices("v5p-128", 1)
    model = shape_of(config)
    program = read_program(compile_step(config, model, found)[1])
    pace = timeline.pace_of(config, model, len(found), found[0].device_kind)
    elements, y = [], 26.0
    for i, (kind, color) in enumerate(timeline.COLORS.items()):
        elements += [f'<rect x="{170 * i}" y="2" width="10" height="10" fill="{color}"/>',
                     text(170 * i + 15, 11, timeline.LABELS[kind])]
    for _, events in timeline.layers(program):
        drawn, height = timeline.drawing(timeline.play(events, pace))
        elements += [text(0, y + 14, f"a layer, {timeline.direction(events)}", bold=True),
                     f'<g transform="translate(0 {y + 22:g})">', *drawn, "</g>"]
        y += height + 34
    drawing = shifted(Drawing(elements, timeline.WIDTH + 10, y), 10)
    return svg(drawing, "a layer of a training step over time, forward and backward")


FIGURES = {"one_stream": one_stream, "two_streams": two_streams, "position_dependent": position_dependence,
           "unmasking_schedules": unmasking_schedules}
COMPILED = {"layer": layer}

if __name__ == "__main__":
    for name, draw in (FIGURES | (COMPILED if "--compiled" in sys.argv else {})).items():
        (OUT / f"{name}.svg").write_text(draw(), encoding="utf-8")
