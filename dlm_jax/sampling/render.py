"""Watching a text come out of the noise: the frames of a sample, replayed in a terminal.

Nothing moves but the letters: a hidden token stands there as wide as it will be, with its spaces and line breaks.
"""

import re
import time
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

HIDDEN = ("", "░", "〓")  # by the cells of a terminal that a character takes
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would move the cursor or worse
WIDEST = 100
SLOWEST = 0.3  # seconds a frame


def frame(pieces: Sequence[str], order: Sequence[int], step: int) -> Text:
    """The text after `step`: given tokens dim, older ones plain, those of this step bright, the rest hidden."""
    text = Text()
    for piece, committed in zip(map(printable, pieces), order):
        if committed > step:
            text.append(hidden(piece), style="grey42")
        elif committed == 0:
            text.append(piece, style="dim")
        else:
            text.append(piece, style="bold black on green" if committed == step else "green")
    return text


def frames(pieces: Sequence[str], order: Sequence[int]) -> Iterator[Text]:
    """From the bare canvas, step by step, to the finished text, which has no bright tokens."""
    for step in range(max(order, default=0) + 2):
        yield frame(pieces, order, step)


def play(pieces: Sequence[str], order: Sequence[int], console: Console, seconds: float = 4.0) -> None:
    """Replays a sample on a terminal within about `seconds`; elsewhere prints the finished text only."""
    last = max(order, default=0)
    if not console.is_terminal:
        console.print(frame(pieces, order, last + 1), soft_wrap=True)
        return
    width = min(console.width, WIDEST)
    with Live(console=console, auto_refresh=False) as live:
        for step, text in enumerate(frames(pieces, order)):
            done = step > last
            panel = Panel(text, title=caption(order, min(step, last)), title_align="left", padding=(0, 1), width=width,
                          border_style="green" if done else "grey42")
            live.update(panel, refresh=True)
            if not done:
                time.sleep(min(seconds / (last + 1), SLOWEST))


def caption(order: Sequence[int], step: int) -> str:
    """How far it is after `step`, always equally wide."""
    last, tokens = max(order, default=0), sum(committed > 0 for committed in order)
    there = sum(0 < committed <= step for committed in order)
    return f"step {step:{len(str(last))}} of {last}, {there:{len(str(tokens))}} of {tokens} tokens"


def printable(piece: str) -> str:
    """`piece` with tabs as spaces and other control characters, bar the line break, as U+FFFD."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece.replace("\r\n", "\n").expandtabs(4))


def hidden(piece: str) -> str:
    """`piece` with something of the same width in place of each letter."""
    return "".join(c if c.isspace() else HIDDEN[cell_len(c)] for c in piece)
