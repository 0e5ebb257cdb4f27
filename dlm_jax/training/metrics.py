"""The logs of a run: one JSON object per line, and the same numbers for TensorBoard and Weights & Biases."""

import dataclasses
import hashlib
import json
import math
import os
import socket
import textwrap
import time
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from dlm_jax.config import Config
from dlm_jax.errors import UserError
from dlm_jax.files import write_text
from dlm_jax.schema.json_text import MAX_LINE, parse_json, read_regular

MAX_LOG = 2**32  # bytes; a run of a million steps writes 2**28


class JsonLines:
    """A file of one JSON object per line, each with a `step`; a resumed run appends after step `restored`.

    Lines of later steps are removed first, since the run will write them again, and so are lines that are no record:
    what a kill truncated or a disk damaged.
    """

    def __init__(self, path: Path, restored: int) -> None:
        lines = read_regular(path, MAX_LOG).splitlines() if path.exists() else []
        kept = [line.decode() + "\n" for line in lines if (step := _step(line)) is not None and step <= restored]
        write_text(path, "".join(kept))
        self._file = path.open("ab", buffering=0)  # unbuffered, so that a full disk shows at once

    def write(self, record: dict[str, Any]) -> None:
        """Hands one record to the operating system; non-finite numbers become null."""
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value
                 for key, value in record.items()}
        line = json.dumps(clean).encode() + b"\n"
        while line:
            line = line[self._file.write(line):]

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def _step(line: bytes) -> int | None:
    """The step of a record; None for a line that is no record."""
    try:
        step = parse_json(line, MAX_LINE)["step"]
    except (ValueError, TypeError, KeyError):
        return None
    return step if type(step) is int else None


class Board:
    """TensorBoard's event file. Written by this thread: an `EventFileWriter`'s thread would hide a full disk."""

    def __init__(self, directory: Path, restored: int) -> None:
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():010.0f}.{socket.gethostname()}.{os.getpid()}.from{restored}"
        self._events = RecordWriter((directory / name).open("wb"))
        self._write(file_version="brain.Event:2")
        if restored:  # makes TensorBoard drop the steps that this run repeats
            self._write(step=restored + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        """Records the values as `group/name`."""
        self._write(step=step, summary=Summary(value=[
            Summary.Value(tag=f"{group}/{name}", simple_value=value) for name, value in values.items()]))

    def texts(self, step: int, texts: list[str]) -> None:
        """Records texts, each as `samples/number`, as code blocks of TensorBoard's Text tab."""
        plugin = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        self._write(step=step, summary=Summary(value=[
            Summary.Value(tag=f"samples/{number}", metadata=plugin,
                          tensor=make_tensor_proto([textwrap.indent(text, "    ")]))
            for number, text in enumerate(texts)]))

    def _write(self, **fields: Any) -> None:
        self._events.write(Event(wall_time=time.time(), **fields).SerializeToString())
        self._events.flush()

    def close(self) -> None:
        """Closes the file."""
        self._events.close()


class Wandb:
    """A run of a Weights & Biases project; resuming in the same work directory resumes the same run.

    Raises `UserError` if its package is not installed.
    """

    def __init__(self, project: str, workdir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UserError("log.wandb needs the package wandb: pip install wandb, or leave log.wandb empty") from None
        name = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[:16]
        self._run = wandb.init(project=project, dir=str(workdir), name=workdir.name, id=name, resume="allow",
                               config=config)

    def scalars(self, group: str, step: int, values: dict[str, float]) -> None:
        """Records the values as `group/name`."""
        self._run.log({f"{group}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Ends the run."""
        self._run.finish()


class NoLog:
    """The log of every process but the primary one: writes nothing."""

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Does nothing."""

    def samples(self, step: int, texts: list[str]) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class RunLog(NoLog):
    """`metrics.jsonl` (training), `validation.jsonl`, `samples.jsonl` and `tensorboard/` of a work directory, and
    Weights & Biases if the config names a project."""

    def __init__(self, workdir: Path, restored: int, config: Config) -> None:
        self._board = Board(workdir / "tensorboard", restored)
        self._boards: list[Board | Wandb] = [self._board]
        if config.log.wandb:
            self._boards.append(Wandb(config.log.wandb, workdir, dataclasses.asdict(config)))
        before = restored if restored else -1  # a new run writes a line for step 0 itself
        self._training = JsonLines(workdir / "metrics.jsonl", restored)
        self._validation = JsonLines(workdir / "validation.jsonl", before)
        self._samples = JsonLines(workdir / "samples.jsonl", before) if config.evaluate.num_samples else None

    def training(self, step: int, metrics: dict[str, float]) -> None:
        """Records the training metrics of a step."""
        self._training.write({"step": step, **metrics})
        for board in self._boards:
            board.scalars("train", step, metrics)

    def validation(self, step: int, metrics: dict[str, float]) -> None:
        """Records the validation metrics after a step."""
        self._validation.write({"step": step, **metrics})
        for board in self._boards:
            board.scalars("validation", step, metrics)

    def samples(self, step: int, texts: list[str]) -> None:
        """Records the texts that the model wrote after a step."""
        if self._samples is not None:
            self._samples.write({"step": step, "texts": texts})
        self._board.texts(step, texts)

    def close(self) -> None:
        """Closes all files."""
        for file in (self._training, self._validation, self._samples):
            if file is not None:
                file.close()
        for board in self._boards:
            board.close()
