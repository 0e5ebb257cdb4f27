"""What a person sees of a run, on stderr of its first process: a bar on a terminal, a line a logged step elsewhere."""

import contextlib
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dlm_jax.cluster import leads
from dlm_jax.config import Config


class Progress:
    """Steps done, loss, NELBO, tokens a second and the time that is left. Pauses are not counted as training."""

    def __init__(self, config: Config, start: int, length: int) -> None:
        self._console = Console(stderr=True, quiet=not leads())
        self._tokens_a_step = config.train.batch * length
        self._steps = config.train.steps
        self._bar = Bar(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=self._console,
                        disable=not self._console.is_terminal)
        self._task = self._bar.add_task(config.recipe.name, total=config.train.steps, completed=start, figures="")
        self._since = self._number = start
        self._mark = time.perf_counter()
        self._nelbo = ""

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def begin(self) -> None:
        """The first step is next: the clock starts."""
        self._mark = time.perf_counter()

    def advance(self, number: int) -> None:
        """Step `number` was handed to the device."""
        self._number = number
        self._bar.update(self._task, completed=number)

    def tokens_per_second(self) -> float:
        """Since the last call."""
        now = time.perf_counter()
        rate = (self._number - self._since) * self._tokens_a_step / max(now - self._mark, 1e-9)
        self._mark, self._since = now, self._number
        return rate

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here is not training time."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def report(self, number: int, values: dict[str, float]) -> None:
        """Shows the metrics of step `number`."""
        figures = f"loss {values['loss']:.3f}{self._nelbo}  {values['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, figures=figures)
        if not self._console.is_terminal:
            self.say(f"step {number}/{self._steps}  {figures}")

    def validated(self, number: int, nelbo: float) -> None:
        """Shows what validation found after step `number`."""
        self._nelbo = f"  validation {nelbo:.3f}"
        self.say(f"step {number}/{self._steps}  validation {nelbo:.4f} nats/token")
