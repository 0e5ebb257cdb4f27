"""The work directory of a run: its config says whose it is, and a run that never began leaves nothing in it."""

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

from dlm_jax.config import Config, build, to_json
from dlm_jax.errors import UserError
from dlm_jax.files import describe, read_json, write_text
from dlm_jax.training.remote import POINTER, checkpoints_of

# Groups that a restarted run may change, and train.steps: how long it goes on and what it says, not what it computes.
FREE_GROUPS = ("checkpoint", "log", "evaluate", "mesh")


@contextlib.contextmanager
def claimed(workdir: Path, config: Config) -> Iterator[None]:
    """Makes `workdir` the place of the run that `config` describes, or finds it to be so, while the block lasts.

    A block that fails before the run's first checkpoint or logged step leaves no trace of a new run. Raises `UserError`
    where the directory holds another run or other files, and where it cannot be written.
    """
    absent, file = not workdir.exists(), workdir / "config.json"
    new = not file.exists()
    if new:
        _check_empty(workdir)
    else:
        _check_same(build(Config, read_json(file)), config, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(file, to_json(config) + "\n")
        yield
    except BaseException as error:
        if new and not _has_begun(workdir):
            _clear(workdir, absent)
        if isinstance(error, OSError):
            raise UserError(f"the run in {workdir} cannot go on: {describe(error)}; free space or name a writable "
                            "place") from error
        raise


def checkpoint_steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints are whole, in order; Orbax gives one that is being written another name."""
    place = checkpoints_of(workdir)
    return sorted(int(path.name) for path in place.iterdir() if path.name.isdecimal()) if place.exists() else []


def _has_begun(workdir: Path) -> bool:
    metrics = workdir / "metrics.jsonl"
    return bool(checkpoint_steps(workdir)) or (metrics.exists() and metrics.stat().st_size > 0)


def _clear(workdir: Path, itself: bool) -> None:
    """Removes what is in a directory that was empty when we came, and `itself` where it was not there."""
    for path in workdir.iterdir() if workdir.is_dir() else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if itself and workdir.is_dir():
        workdir.rmdir()


def _check_empty(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir} is a file; name a directory for the run")
    if workdir.exists() and any(path.suffix != ".partial" and path.name != POINTER for path in workdir.iterdir()):
        raise UserError(f"{workdir} is not empty and holds no run; name a new directory or that of a run")


def _check_same(old: Config, new: Config, workdir: Path) -> None:
    for group in dataclasses.fields(Config):
        before, now = (dataclasses.asdict(getattr(c, group.name)) for c in (old, new))
        changed = [key for key in before if before[key] != now[key] and (group.name, key) != ("train", "steps")]
        if changed and group.name not in FREE_GROUPS:
            raise UserError(f"{workdir} holds a run with {group.name}.{changed[0]} = {before[changed[0]]!r}, not "
                            f"{now[changed[0]]!r}; choose another work directory or the same config")
    reached = max(checkpoint_steps(workdir), default=0)
    if new.train.steps < reached:
        raise UserError(f"{workdir} holds a run that is at step {reached}, beyond train.steps = {new.train.steps}; "
                        f"choose another work directory or a train.steps of at least {reached}")
