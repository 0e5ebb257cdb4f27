"""The live view: a terminal that shows each step while the next ones are being made."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dlm_jax.sampling.render import WIDEST, printable
from dlm_jax.sampling.trace import Trace

FASTEST = 0.04  # seconds a step stays on the screen; the sampler does not wait for it
MASKED = "░░░"


@contextlib.contextmanager
def live(pieces: Callable[[Sequence[int]], list[str]], console: Console) -> Iterator[Callable[[Trace], None]]:
    """A callback whose steps are shown, one after the other, by a thread of its own; at the end it is waited for.
    pieces: what each of some tokens adds to a text."""
    steps: queue.SimpleQueue[Trace | None] = queue.SimpleQueue()

    def show() -> None:
        with Live(console=console, auto_refresh=False) as screen:
            while (trace := steps.get()) is not None:
                screen.update(panel(pieces, trace, min(console.width, WIDEST)), refresh=True)
                time.sleep(FASTEST)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield steps.put
    finally:
        steps.put(None)
        thread.join()


def panel(pieces: Callable[[Sequence[int]], list[str]], trace: Trace, width: int) -> Panel:
    """The first sequence of a trace in a frame; what was written last is bright."""
    masked, order = trace.masked[0], trace.order[0]
    n = int(max((order > 0).nonzero()[0].max(initial=0), masked.nonzero()[0].max(initial=0))) + 1
    n = max(n, int(trace.tokens[0].nonzero()[0].max(initial=0)) + 1)
    text, last = Text(), int(order.max())
    for piece, hidden, step in zip(pieces(trace.tokens[0, :n].tolist()), masked, order):
        if hidden:
            text.append(MASKED, style="grey42")
        else:
            style = "dim" if step == 0 else "bold black on green" if step == last and masked.any() else "green"
            text.append(printable(piece), style=style)
    written = int((order > 0).sum() - (masked & (order > 0)).sum())
    title = f"step {last}, {written} of {written + int(masked.sum())} tokens, {int(trace.forwards[0])} passes"
    return Panel(text, title=title, title_align="left", padding=(0, 1), width=width,
                 border_style="grey42" if masked.any() else "green")
