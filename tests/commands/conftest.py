"""The command, in this process and in one of its own."""

import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest

from dlm_jax.commands.main import main


class Result(NamedTuple):
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def dlm(capfd) -> Callable[..., Result]:
    """Runs `dlm` with these arguments in this process."""
    def run(*arguments: object) -> Result:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capfd.readouterr())

    return run


@pytest.fixture
def refused(dlm) -> Callable[..., str]:
    """Runs a command that must end with code 2 and exactly one sentence, which it returns."""
    def run(*arguments: object) -> str:
        result = dlm(*arguments)
        assert (result.code, result.out) == (2, ""), result
        assert result.err.startswith("dlm: ") and result.err.count("\n") == 1, result.err
        return result.err.removeprefix("dlm: ").strip()

    return run


@pytest.fixture
def process() -> Callable[..., Result]:
    """Runs `dlm` in a process of its own, with these bytes on stdin or the stdin that there is."""
    def run(*arguments: object, stdin: bytes | None = None) -> Result:
        command = [sys.executable, "-m", "dlm_jax", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, input=stdin)
        return Result(done.returncode, done.stdout.decode(), done.stderr.decode())

    return run


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, tiny_config, tiny_run):
    """A finished run of two steps."""
    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config
    directory = tmp_path_factory.mktemp("work") / "run"
    short = ["train.steps=2", "recipe.anneal_steps=0", "optimizer.warmup_steps=0"]
    adapt(load_config(tiny_config, [*tiny_run, *short]), directory)
    return directory
