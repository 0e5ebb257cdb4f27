"""What a person sees of a run, on stderr of its primary process: a bar on a terminal, else one line per logged step."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dlm_jax.config import Config
from dlm_jax.parallel.distributed import is_primary


class ProgressBar:
    """Steps done, loss, NELBO, tokens per second, MFU if the devices' peak is known, and the time left."""

    def __init__(self, config: Config) -> None:
        self._console = Console(stderr=True, quiet=not is_primary())
        self._steps = config.train.steps
        self._bar = Progress(TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(),
                             TextColumn("{task.fields[figures]}"), TimeRemainingColumn(), console=self._console,
                             disable=not self._console.is_terminal)
        self._task = self._bar.add_task(config.recipe.name, total=config.train.steps, figures="")
        self._loss, self._nelbo, self._speed = "", "", ""

    def __enter__(self) -> "ProgressBar":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def log(self, text: str) -> None:
        """Prints a line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, step: int) -> None:
        """Moves the bar: `step` steps are done or on the device."""
        self._bar.update(self._task, completed=step)

    def report(self, step: int, metrics: dict[str, float]) -> None:
        """Shows the metrics of a step."""
        self._loss = f"loss {metrics['loss']:.3f}"
        self._loss += f"  reward {metrics['reward']:.3f}" if "reward" in metrics else ""
        self._speed = f"  {metrics['tokens_per_second']:,.0f} tokens/s"
        self._speed += f"  MFU {metrics['mfu']:.1%}" if "mfu" in metrics else ""
        self._show_figures()
        if not self._console.is_terminal:
            self.log(f"step {step}/{self._steps}  {self._loss}{self._speed}")

    def validated(self, step: int, nelbo: float) -> None:
        """Shows the validation NELBO after a step."""
        self._nelbo = f"  validation {nelbo:.3f} at {step}"  # stands beside the loss of later steps
        self._show_figures()
        self.log(f"step {step}/{self._steps}  validation {nelbo:.4f} nats/token")

    def _show_figures(self) -> None:
        self._bar.update(self._task, figures=self._loss + self._nelbo + self._speed)
