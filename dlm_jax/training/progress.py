"""What a person sees of a run, on stderr of its first process: a bar on a terminal, a line a logged step elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dlm_jax.cluster import leads
from dlm_jax.config import Config


class Progress:
    """Steps done, loss, NELBO, tokens a second, MFU where the peak is known, and the time that is left."""

    def __init__(self, config: Config) -> None:
        self._console = Console(stderr=True, quiet=not leads())
        self._steps = config.train.steps
        self._bar = Bar(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                        TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=self._console,
                        disable=not self._console.is_terminal)
        self._task = self._bar.add_task(config.recipe.name, total=config.train.steps, figures="")
        self._nelbo = ""

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def begin(self, step: int) -> None:
        """Step `step` is done already."""
        self._bar.update(self._task, completed=step)

    def say(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, number: int) -> None:
        """Step `number` was handed to the device."""
        self._bar.update(self._task, completed=number)

    def report(self, number: int, values: dict[str, float]) -> None:
        """Shows the metrics of step `number`."""
        figures = f"loss {values['loss']:.3f}{self._nelbo}  {values['tokens_per_second']:,.0f} tokens/s"
        figures += f"  MFU {values['mfu']:.1%}" if "mfu" in values else ""
        self._bar.update(self._task, figures=figures)
        if not self._console.is_terminal:
            self.say(f"step {number}/{self._steps}  {figures}")

    def validated(self, number: int, nelbo: float) -> None:
        """Shows what validation found after step `number`."""
        self._nelbo = f"  validation {nelbo:.3f}"
        self.say(f"step {number}/{self._steps}  validation {nelbo:.4f} nats/token")
