"""Runs of a tiny model: what they log, how they are started as processes, and one that is never interrupted."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.models.weights import flatten
from dlm_jax.runs.read import read_work_directory

PATIENCE = 120


def records(workdir: Path, name: str = "metrics.jsonl") -> dict[int, float]:
    """What a log says by step, without timings; each step must occur once."""
    lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    for line in lines:
        for clock in ("tokens_per_second", "seconds_per_step", "data_seconds", "host_seconds"):
            line.pop(clock, None)
    steps = [line.pop("step") for line in lines]
    assert steps == sorted(set(steps))
    return dict(zip(steps, lines))


def same_weights(a: Path, b: Path) -> bool:
    weights, others = (flatten(read_work_directory(workdir).params) for workdir in (a, b))
    return all(np.array_equal(weights[path], others[path]) for path in weights)


@pytest.fixture(scope="session")
def config(tiny_config, tiny_run):
    return load_config(tiny_config, tiny_run)


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    adapt(config, workdir)
    return workdir


def command(tiny_config, tiny_run, workdir: Path) -> list[str]:
    return [sys.executable, "-m", "dlm_jax", "train", "--config", str(tiny_config), "--workdir", str(workdir),
            *(f"--config.{override}" for override in tiny_run)]


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns once the run has logged `step`."""
    end = time.monotonic() + PATIENCE
    log = workdir / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.fixture(scope="session")
def runs() -> SimpleNamespace:
    """The functions above, for the tests."""
    return SimpleNamespace(records=records, same_weights=same_weights, command=command, wait_for_step=wait_for_step)
