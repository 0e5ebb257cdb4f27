"""Watching a text come out of the noise: the frames of a sample, replayed in a terminal."""

import time
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

PENDING = "░"


def frame(pieces: Sequence[str], order: Sequence[int], step: int) -> Text:
    """The text after `step`: given tokens dim, older ones plain, those of this step bright, the rest hidden."""
    text = Text()
    for piece, committed in zip(pieces, order):
        if committed > step:
            text.append(PENDING, style="grey42")
        else:
            text.append(piece, style="dim" if committed == 0 else "bold black on green" if committed == step else "green")
    return text


def frames(pieces: Sequence[str], order: Sequence[int]) -> Iterator[tuple[int, Text]]:
    """(step, frame) from the bare canvas to the finished text, which has no bright tokens."""
    last = max(order, default=0)
    for step in range(last + 1):
        yield step, frame(pieces, order, step)
    yield last, frame(pieces, [min(step, 1) and -1 for step in order], last)


def play(pieces: Sequence[str], order: Sequence[int], console: Console, seconds: float = 4.0) -> None:
    """Replays a sample on a terminal within about `seconds`; elsewhere prints the finished text only."""
    last = max(order, default=0)
    if not console.is_terminal:
        console.print(Panel(frame(pieces, order, last), title=f"{last} steps"))
        return
    with Live(console=console, refresh_per_second=30, transient=False) as live:
        for step, text in frames(pieces, order):
            live.update(Panel(text, title=f"step {step} of {last}"), refresh=True)
            time.sleep(seconds / (last + 2))
