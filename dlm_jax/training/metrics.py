"""What a run leaves to be read: one JSON object a line, and the same for TensorBoard."""

import json
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter


class JsonLines:
    """A file of one JSON object a line, each with a `step`; a restarted run takes up after step `restored`.

    Lines after it, and one that a kill cut in the middle, are removed first: the run makes them again.
    """

    def __init__(self, path: Path, restored: int) -> None:
        kept = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= restored:
                    kept.append(line + "\n")
            except ValueError:
                break
        partial = path.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(path)
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record and hands it to the operating system."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class RunLog:
    """`metrics.jsonl` (training), `validation.jsonl` and `tensorboard/` of a work directory."""

    def __init__(self, workdir: Path, restored: int) -> None:
        self._training = JsonLines(workdir / "metrics.jsonl", restored)
        self._validation = JsonLines(workdir / "validation.jsonl", restored if restored else -1)
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=restored + 1)

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Records the training metrics of a step."""
        self._training.write({"step": step, **metrics})
        self._scalars("train", step, metrics)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Records what validation found after a step."""
        self._validation.write({"step": step, **metrics})
        self._scalars("validation", step, metrics)

    def _scalars(self, group: str, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(f"{group}/{name}", value, step)

    def close(self) -> None:
        """Closes all three."""
        self._training.close()
        self._validation.close()
        self._board.close()
