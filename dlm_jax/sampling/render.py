"""Replays a finished sample in a terminal, step by step.

Nothing moves as the text appears: a hidden token takes the width it will have, with its spaces and line breaks.
"""

import re
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.columns import Columns
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dlm_jax.sampling.sample import Sample

HIDDEN = ("", "░", "〓")  # what stands for a character, by the terminal cells that it takes
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # would move the cursor, or worse
MAX_WIDTH = 100  # terminal cells
MAX_FRAME_SECONDS = 0.3


def frame(pieces: Sequence[str], commit_step: Sequence[int], step: int) -> Text:
    """The text after `step`: the prompt dim, older tokens plain, those of this step bright, the rest hidden."""
    text = Text()
    for piece, committed in zip(map(printable, pieces), commit_step):
        if committed > step:
            text.append(hidden(piece), style="grey42")
        elif committed == 0:
            text.append(piece, style="dim")
        else:
            text.append(piece, style="bold black on green" if committed == step else "green")
    return text


def frames(pieces: Sequence[str], commit_step: Sequence[int]) -> Iterator[Text]:
    """From the prompt alone, step by step, to the finished text, in which no token is bright."""
    for step in range(max(commit_step, default=0) + 2):
        yield frame(pieces, commit_step, step)


def play(pieces: Sequence[str], commit_step: Sequence[int], console: Console, seconds: float = 4.0) -> None:
    """Replays a sample on a terminal in about `seconds` at most; elsewhere prints only the finished text."""
    last = max(commit_step, default=0)
    if not console.is_terminal:
        console.print(frame(pieces, commit_step, last + 1), soft_wrap=True)
        return
    width = min(console.width, MAX_WIDTH)
    with Live(console=console, auto_refresh=False) as live:
        for step, text in enumerate(frames(pieces, commit_step)):
            done = step > last
            panel = Panel(text, title=caption(commit_step, min(step, last)), title_align="left", padding=(0, 1),
                          width=width, border_style="green" if done else "grey42")
            live.update(panel, refresh=True)
            if not done:
                time.sleep(min(seconds / (last + 1), MAX_FRAME_SECONDS))


def race(runs: Mapping[str, tuple[Sequence[str], Sample]], console: Console, seconds: float = 6.0) -> None:
    """Replays samples side by side on a terminal, each at the speed at which it was written, slowed down so that the
    slowest takes `seconds`; elsewhere prints the text of the first. runs: name to (pieces, sample)."""
    first, *_ = runs.values()
    if not console.is_terminal:
        play(first[0], first[1].commit_step, console)
        return
    slowest = max(sample.cost.seconds for _, sample in runs.values())
    width = min(console.width // len(runs), MAX_WIDTH)
    start = time.monotonic()
    with Live(console=console, auto_refresh=False) as live:
        done = False
        while not done:
            now = (time.monotonic() - start) * slowest / seconds
            done = now > slowest
            panels = [racing(name, pieces, sample, now, width) for name, (pieces, sample) in runs.items()]
            live.update(Columns(panels, padding=0), refresh=True)
            time.sleep(0.03)


def racing(name: str, pieces: Sequence[str], sample: Sample, now: float, width: int) -> Panel:
    """A sample as it stood after `now` seconds of its own time."""
    last = max(sample.commit_step)
    step = min(int(now / sample.cost.seconds * last), last)
    done = step == last
    milliseconds = 1000 * min(now, sample.cost.seconds)
    title = f"{name}: {milliseconds:5.1f} ms, {sample.tokens_per_forward:.1f} tokens per forward"
    return Panel(frame(pieces, sample.commit_step, step + done), title=title, title_align="left", padding=(0, 1),
                 width=width, border_style="green" if done else "grey42")


def caption(commit_step: Sequence[int], step: int) -> str:
    """The progress after `step`, in a constant width."""
    last, total = max(commit_step, default=0), sum(committed > 0 for committed in commit_step)
    written = sum(0 < committed <= step for committed in commit_step)
    return f"step {step:{len(str(last))}} of {last}, {written:{len(str(total))}} of {total} tokens"


def printable(piece: str) -> str:
    """`piece` with tabs as spaces, and control characters other than line breaks as U+FFFD."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", piece.replace("\r\n", "\n").expandtabs(4))


def hidden(piece: str) -> str:
    """`piece` with every character but white space replaced by one of the same width."""
    return "".join(c if c.isspace() else HIDDEN[cell_len(c)] for c in piece)
