"""Progress on stderr: a bar on a terminal, an occasional line elsewhere. Also the library's own log lines."""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator

LINE_SECONDS = 30.0  # between two lines where there is no terminal


@contextlib.contextmanager
def byte_progress(verb: str) -> Iterator[Callable[[int], None]]:
    """Yields a function that shows how many bytes are done."""
    from rich.console import Console
    from rich.progress import BarColumn, FileSizeColumn, Progress, TextColumn, TimeElapsedColumn, TransferSpeedColumn
    console = Console(stderr=True)
    if not console.is_terminal:
        yield throttled(lambda done, seconds: f"{verb} {done / 1e6:.0f} MB, {done / 1e6 / seconds:.1f} MB/s")
        return
    with Progress(TextColumn("{task.description}"), BarColumn(20), FileSizeColumn(), TransferSpeedColumn(),
                  TimeElapsedColumn(), console=console) as bar:
        task = bar.add_task(verb, total=None)  # the size of a compressed file's text is known only at its end
        yield lambda done: bar.update(task, completed=done)


@contextlib.contextmanager
def count_progress(verb: str) -> Iterator[Callable[[int, int], None]]:
    """Yields a function that shows how many items are done, and how many there are."""
    from rich.console import Console
    from rich.progress import Progress
    console = Console(stderr=True)
    if not console.is_terminal:
        show = throttled(lambda counts, _: f"{verb} {counts[0]} of {counts[1]}")
        yield lambda done, total: show((done, total))
        return
    with Progress(console=console) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def throttled(line: Callable) -> Callable:
    """A function of x that prints line(x, seconds since the start), at most once every LINE_SECONDS."""
    began = printed = time.monotonic()

    def show(x: object) -> None:
        nonlocal printed
        now = time.monotonic()
        if now - printed >= LINE_SECONDS:
            printed = now
            print(line(x, now - began), file=sys.stderr, flush=True)

    return show


def show_log() -> None:
    """Shows on stderr what the library logs, such as which attention implementation runs."""
    log = logging.getLogger("dlm_jax")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [logging.StreamHandler()]
