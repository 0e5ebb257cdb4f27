"""The work directory of a run: `config.json` identifies the run, `lock` its one writer, and a run that never began
leaves nothing in it."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from dlm_jax.config import Config, to_json
from dlm_jax.errors import UserError
from dlm_jax.files import describe, read_json, write_text
from dlm_jax.runs.lock import check_lock, locked
from dlm_jax.runs.places import LOCK
from dlm_jax.runs.remote import checkpoints_of, is_mirror
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.record import from_json

# A resumed run may change these groups, and train.steps: they decide how long it runs and what it reports, not what it
# computes.
FREE_GROUPS = ("checkpoint", "log", "evaluate", "mesh")


@contextlib.contextmanager
def claimed(workdir: Path, config: Config) -> Iterator[None]:
    """Makes `workdir` the directory of the run that `config` describes, or checks that it already is, and locks it.

    If the block fails before the first checkpoint or logged step of a new run, the run leaves no trace. Raises
    `UserError` if another run has the lock, if the directory holds another run or other files, or if it cannot be
    written.
    """
    _check_empty(workdir)  # before the lock is written: nothing is, beside the files of somebody else
    try:
        with contextlib.nullcontext() if is_mirror(workdir) else locked(workdir), _begun(workdir, config):
            yield
    except OSError as error:
        raise UserError(f"the run in {workdir} cannot continue: {describe(error)}; free space or name a writable "
                        "directory") from error


@contextlib.contextmanager
def _begun(workdir: Path, config: Config) -> Iterator[None]:
    """`claimed`, by the holder of the lock."""
    file = workdir / "config.json"
    new = not file.exists()
    if not new:
        _check_same(from_json(Config, read_json(file), str(file)), config, workdir)
    try:
        write_text(file, to_json(config) + "\n")
        yield
    except BaseException:
        if new and not _has_begun(workdir):
            check_lock(workdir)
            _clear(workdir)
        raise


def checkpoint_steps(workdir: Path) -> list[int]:
    """The steps that have a finished checkpoint, ascending; Orbax names a checkpoint with its step once it is complete.
    """
    directory = checkpoints_of(workdir)
    if not directory.exists():
        return []
    return sorted(int(path.name) for path in directory.iterdir() if path.name.isdecimal())


def _has_begun(workdir: Path) -> bool:
    metrics = workdir / "metrics.jsonl"
    return bool(checkpoint_steps(workdir)) or (metrics.exists() and metrics.stat().st_size > 0)


def _clear(workdir: Path) -> None:
    """Removes what this run wrote into a directory that was empty before; the lock goes last, by itself."""
    checkpoints = checkpoints_of(workdir)
    if checkpoints.exists():  # in a store, if there is one
        checkpoints.rmtree()
    for path in workdir.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def _check_empty(workdir: Path) -> None:
    """Raises `UserError` if `workdir` holds no run but something else, other than what a killed start leaves."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; name a directory for the run")
    if not workdir.exists() or (workdir / "config.json").exists():
        return
    if any(path.suffix != ".partial" and path.name != LOCK for path in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run; name a new directory or that of a run")


def _check_same(old: Config, new: Config, workdir: Path) -> None:
    for group in dataclasses.fields(Config):
        before, after = (dataclasses.asdict(getattr(config, group.name)) for config in (old, new))
        changed = [key for key in before if before[key] != after[key] and (group.name, key) != ("train", "steps")]
        if changed and group.name not in FREE_GROUPS:
            key = changed[0]
            raise UserError(f"{workdir} holds a run with {group.name}.{key} = {shown(before[key])}, not "
                            f"{shown(after[key])}; choose another work directory or the same config")
    reached = max(checkpoint_steps(workdir), default=0)
    if new.train.steps < reached:
        raise UserError(f"{workdir} holds a run that is at step {reached}, beyond train.steps = {new.train.steps}; "
                        f"choose another work directory or a train.steps of at least {reached}")
