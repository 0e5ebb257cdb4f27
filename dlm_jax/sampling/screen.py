"""The live view: shows each step in a terminal while the sampler computes the next ones."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from dlm_jax.sampling.render import MAX_WIDTH, printable
from dlm_jax.sampling.trace import Trace
from dlm_jax.typing import Array, Shaped

MIN_STEP_SECONDS = 0.04  # how long a step stays on the screen; the sampler does not wait for it
MASKED = "░░░"


@contextlib.contextmanager
def live(pieces: Callable[[Sequence[int]], list[str]], console: Console) -> Iterator[Callable[[Trace], None]]:
    """A callback whose traces a separate thread shows one after the other. On exit, waits until all have been shown.

    pieces: gives what each token adds to the text.
    """
    traces: queue.SimpleQueue[Trace | None] = queue.SimpleQueue()  # None ends the thread

    def show() -> None:
        with Live(console=console, auto_refresh=False) as screen:
            while (trace := traces.get()) is not None:
                screen.update(panel(pieces, trace, min(console.width, MAX_WIDTH)), refresh=True)
                time.sleep(MIN_STEP_SECONDS)

    thread = threading.Thread(target=show, daemon=True)
    thread.start()
    try:
        yield traces.put
    finally:
        traces.put(None)
        thread.join()


def panel(pieces: Callable[[Sequence[int]], list[str]], trace: Trace, width: int) -> Panel:
    """The first sequence of a trace in a frame, with the tokens of the last step bright."""
    masked, commit_step, ids = trace.masked[0], trace.commit_step[0], trace.tokens[0]
    n = 1 + max(last_index(commit_step > 0), last_index(masked), last_index(ids))
    text, last = Text(), int(commit_step.max())
    for piece, hidden, step in zip(pieces(ids[:n].tolist()), masked, commit_step):
        if hidden:
            text.append(MASKED, style="grey42")
        else:
            style = "dim" if step == 0 else "bold black on green" if step == last and masked.any() else "green"
            text.append(printable(piece), style=style)
    written = int(((commit_step > 0) & ~masked).sum())
    title = f"step {last}, {written} of {written + int(masked.sum())} tokens, NFE {int(trace.nfe[0])}"
    return Panel(text, title=title, title_align="left", padding=(0, 1), width=width,
                 border_style="grey42" if masked.any() else "green")


def last_index(x: Shaped[Array, " n"]) -> int:
    """The index of the last entry that is not zero, or 0."""
    return int(x.nonzero()[0].max(initial=0))
