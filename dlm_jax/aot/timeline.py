"""The layers of a compiled step over time: what the core does, what it waits for, and what travels meanwhile.

A page that needs nothing else. Of every loop that runs attention it draws one trip: a layer forward, and one backward.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from dlm_jax.aot.estimate import kernel_run, kernel_seconds
from dlm_jax.aot.hlo import KINDS
from dlm_jax.aot.program import Event, Loop
from dlm_jax.config import Config
from dlm_jax.models.config import ModelConfig
from dlm_jax.parallel.device_specs import device_spec

COLORS = {"products": "#1b7f5c", "kernels": "#4c78a8", "copies": "#d08327", "other": "#9a9a9a", "waiting": "#b8383b",
          "collectives": "#8c6bb1"}
LABELS = {"products": "products of matrices", "kernels": "attention kernels", "copies": "copies",
          "other": "other fusions", "waiting": "waiting for a collective", "collectives": "a collective on its way"}
BACKWARD_KERNELS = ("attention_backward", "d_queries_kernel", "d_keys_kernel")
WIDTH, CORE, LINK = 1000, 44, 14  # of a drawing, of the core's row and of a row of transfers, in pixels
SHORT = 0.003  # neighbors below this share of the trip are drawn as one bar

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif }}
body {{ max-width: 1040px; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.3rem }} h2 {{ font-size: 1.05rem; margin: 2rem 0 .4rem }}
svg {{ width: 100%; height: auto; display: block }} svg text {{ font-size: 11px; fill: currentColor }}
rect:hover {{ opacity: .6 }}
table {{ border-collapse: collapse; font-size: .9rem }}
td {{ padding: .15rem .9rem .15rem 0; white-space: nowrap }}
td:nth-child(n+2) {{ text-align: right; font-variant-numeric: tabular-nums }}
td:last-child {{ text-align: left; white-space: normal }}
.legend span {{ display: inline-block; margin-right: 1.2rem; white-space: nowrap }}
.legend i {{ display: inline-block; width: .8em; height: .8em; margin-right: .4em }}
code {{ overflow-wrap: anywhere; font-size: .85em }}
</style>
<h1>{title}</h1>
<p>{summary}</p>
<p class="legend">{legend}</p>
{loops}
</html>
"""


class Bar(NamedTuple):
    """A piece of time of the core, or of a collective on its way."""

    kind: str  # a key of `COLORS`
    name: str
    begin: float  # seconds
    seconds: float


class Pace(NamedTuple):
    """How fast the operations of a program run."""

    clock: float  # Hz
    bandwidth: float  # of the links, bytes per second
    kernels: Mapping[str, float]  # seconds of each


class Trip(NamedTuple):
    """One trip of a loop."""

    core: list[Bar]
    links: list[Bar]
    seconds: float


def pace_of(config: Config, model: ModelConfig, count: int, kind: str) -> Pace:
    """That of a step on `count` devices of a kind whose peaks are known."""
    peak = device_spec(kind)
    assert peak is not None
    return Pace(peak.clock, peak.interconnect_bandwidth, kernel_run(config, model, count, kind, peak))


def play(events: Sequence[Event], pace: Pace) -> Trip:
    """A trip.

    A collective travels from its start, as if it had the links for itself; the core waits where it needs the result
    before that has arrived, and for all of a collective that stands in line.
    """
    now, core, links, started = 0.0, list[Bar](), list[Bar](), dict[str, float]()
    for event in events:
        if event.part == "start":
            started[event.transfer] = now
        elif event.kind in KINDS:
            begin, seconds = started.pop(event.transfer, now), event.size / pace.bandwidth
            name = f"{event.kind} of {event.size / 2**20:.1f} MiB, {event.name.rpartition('closed_call/')[2]}"
            links.append(Bar("collectives", name, begin, seconds))
            if begin + seconds > now:
                core.append(Bar("waiting", f"for {event.kind}", now, begin + seconds - now))
                now = begin + seconds
        else:
            seconds = kernel_seconds(pace.kernels, event.name) if event.kind == "kernels" else event.cycles / pace.clock
            core.append(Bar(event.kind, event.name.rpartition("closed_call/")[2], now, seconds))
            now += seconds
    return Trip(core, links, now)


def layers(program: Sequence[Event | Loop], runs: int = 1) -> Iterator[tuple[int, list[Event]]]:
    """Of each innermost loop that runs a kernel: how many trips a step makes, and the events of one."""
    for loop in program:
        if isinstance(loop, Loop):
            yield from layers(loop.body, runs * loop.trips)
            events = [event for event in loop.body if isinstance(event, Event)]
            if len(events) == len(loop.body) and any(event.kind == "kernels" for event in events):
                yield runs * loop.trips, events


def direction(events: Sequence[Event]) -> str:
    """Whether a layer runs forward or backward, by its kernels."""
    return "backward" if any(event.name.startswith(BACKWARD_KERNELS) for event in events) else "forward"


def merged(bars: Sequence[Bar], total: float) -> list[Bar]:
    """The bars, with neighbors of a kind that are too short to see drawn as one."""
    found: list[Bar] = []
    for bar in bars:
        last = found[-1] if found else None
        if last and last.kind == bar.kind and max(last.seconds, bar.seconds) < SHORT * total:
            found[-1] = Bar(bar.kind, "several short ones", last.begin, bar.begin + bar.seconds - last.begin)
        else:
            found.append(bar)
    return found


def rows_of(bars: Sequence[Bar]) -> list[list[Bar]]:
    """The bars in as few rows as keep them apart."""
    rows: list[list[Bar]] = []
    for bar in sorted(bars, key=lambda bar: bar.begin):
        free = next((row for row in rows if row[-1].begin + row[-1].seconds <= bar.begin), None)
        if free is None:
            rows.append(free := [])
        free.append(bar)
    return rows


def drawing(trip: Trip) -> tuple[list[str], int]:
    """A trip as elements of an SVG `WIDTH` wide, and their height."""
    def rect(bar: Bar, y: float, height: float) -> str:
        x, width = bar.begin / trip.seconds * WIDTH, max(bar.seconds / trip.seconds * WIDTH, 0.3)
        tip = html.escape(f"{bar.name or bar.kind}: {bar.seconds * 1e6:,.0f} µs")
        return (f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}" fill="{COLORS[bar.kind]}">'
                f"<title>{tip}</title></rect>")

    parts = [rect(bar, 0, CORE) for bar in merged(trip.core, trip.seconds)]
    rows = rows_of(trip.links)
    parts += [rect(bar, CORE + 6 + LINK * i, LINK - 3) for i, row in enumerate(rows) for bar in row]
    bottom = CORE + 10 + LINK * len(rows)
    for i in range(6):
        anchor = ("start", "middle", "end")[(i > 0) + (i == 5)]
        parts.append(f'<text x="{WIDTH * i / 5:.0f}" y="{bottom + 12}" text-anchor="{anchor}">'
                     f"{trip.seconds * i / 5 * 1e6:,.0f} µs</text>")
    return parts, bottom + 16


def svg(trip: Trip) -> str:
    """A trip as a drawing."""
    parts, height = drawing(trip)
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">{"".join(parts)}</svg>'


def table(trip: Trip, longest: int = 8) -> str:
    """Where the time of a trip goes, and its longest pieces."""
    of_kind = {kind: sum(bar.seconds for bar in trip.core if bar.kind == kind) for kind in COLORS}
    lines = [(LABELS[kind], seconds, "") for kind, seconds in of_kind.items() if seconds]
    top = sorted((bar for bar in trip.core if bar.kind != "waiting"), key=lambda bar: -bar.seconds)[:longest]
    lines += [(bar.kind, bar.seconds, f"<code>{html.escape(bar.name)}</code>") for bar in top]
    body = "".join(f"<tr><td>{kind}</td><td>{seconds * 1e6:,.0f} µs</td><td>{seconds / trip.seconds:.1%}</td>"
                   f"<td>{name}</td></tr>" for kind, seconds, name in lines)
    return f"<table>{body}</table>"


def page(title: str, summary: str, program: Sequence[Event | Loop], pace: Pace) -> str:
    """The page, for a program that `read_program` gave."""
    drawn = []
    for trips, events in layers(program):
        trip = play(events, pace)
        heading = f"A layer, {direction(events)}: {trip.seconds * 1e6:,.0f} µs, {trips} times a step"
        drawn.append(f"<h2>{heading}</h2>{svg(trip)}{table(trip)}")
    legend = "".join(f'<span><i style="background:{color}"></i>{LABELS[kind]}</span>'
                     for kind, color in COLORS.items())
    return PAGE.format(title=html.escape(title), summary=html.escape(summary), legend=legend, loops="\n".join(drawn))
