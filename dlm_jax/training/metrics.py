"""What a run leaves to be read: one JSON object a line, and the same for TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from dlm_jax.files import write_text


class JsonLines:
    """A file of one JSON object a line, each with a `step`; a restarted run takes up after step `restored`.

    Lines after it, and one that a kill cut in the middle, are removed first: the run makes them again.
    """

    def __init__(self, path: Path, restored: int) -> None:
        kept = []
        for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
            try:
                if json.loads(line)["step"] <= restored:
                    kept.append(line + "\n")
            except (ValueError, TypeError, KeyError):
                break
        write_text(path, "".join(kept))
        self._file = path.open("ab", buffering=0)  # a full disk shows at the write, and nothing waits to be flushed

    def write(self, record: dict[str, Any]) -> None:
        """Hands one record to the operating system."""
        line = json.dumps(record).encode() + b"\n"
        while line:
            line = line[self._file.write(line):]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class Board:
    """TensorBoard's event file. Written by this thread: a full disk would go unseen in that of a `SummaryWriter`."""

    def __init__(self, directory: Path, restored: int) -> None:
        directory.mkdir(exist_ok=True)
        self._events = EventsWriter(str(directory / "events"), f".from{restored}")
        if restored:  # TensorBoard then forgets the steps that this run makes again
            self._write(step=restored + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        """Records the values as `group/name`."""
        self._write(step=step, summary=Summary(value=[
            Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in values.items()]))

    def _write(self, **fields: Any) -> None:
        self._events.write_event(Event(wall_time=time.time(), **fields))
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class NoLog:
    """The log of a process that is not the first: nothing."""

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Not here."""

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Not here."""

    def close(self) -> None:
        """Nothing is open."""


class RunLog(NoLog):
    """`metrics.jsonl` (training), `validation.jsonl` and `tensorboard/` of a work directory."""

    def __init__(self, workdir: Path, restored: int) -> None:
        self._training = JsonLines(workdir / "metrics.jsonl", restored)
        self._validation = JsonLines(workdir / "validation.jsonl", restored if restored else -1)
        self._board = Board(workdir / "tensorboard", restored)

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Records the training metrics of a step."""
        self._training.write({"step": step, **metrics})
        self._board.scalars("train", step, metrics)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Records what validation found after a step."""
        self._validation.write({"step": step, **metrics})
        self._board.scalars("validation", step, metrics)

    def close(self) -> None:
        """Closes all three."""
        self._training.close()
        self._validation.close()
        self._board.close()
