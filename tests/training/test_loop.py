"""A run is a function of its config: however often it is stopped, by whatever means, it leaves the same record."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.errors import UserError
from dlm_jax.models.weights import flatten
from dlm_jax.training.checkpoint import Checkpoints, read_work_directory
from dlm_jax.training.metrics import RunLog

pytestmark = pytest.mark.usefixtures("compiled_once")
PATIENCE = 120


class Killed(BaseException):
    """Stops a run where no handler is meant to catch it."""


def records(workdir: Path, name: str = "metrics.jsonl") -> dict[int, float]:
    """What a log says, without the clock; each step must be there once."""
    lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second", None)
    steps = [line.pop("step") for line in lines]
    assert steps == sorted(set(steps))
    return dict(zip(steps, lines))


def same_weights(a: Path, b: Path) -> bool:
    a, b = (flatten(read_work_directory(workdir).params) for workdir in (a, b))
    return all(np.array_equal(a[path], b[path]) for path in a)


@pytest.fixture(scope="module")
def config(tiny_config, tiny_run):
    return load_config(tiny_config, tiny_run)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, config):
    workdir = tmp_path_factory.mktemp("unbroken") / "run"
    adapt(config, workdir)
    return workdir


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of the unbroken run."""
    return shutil.copytree(unbroken, tmp_path / "run")


def test_a_run_leaves_every_step_once_its_validations_and_tensorboard_files(unbroken):
    assert list(records(unbroken)) == list(range(1, 31))
    assert list(records(unbroken, "validation.jsonl")) == [0, 15, 30]
    assert sum(file.stat().st_size for file in (unbroken / "tensorboard").iterdir()) > 1000


def test_tensorboard_holds_the_same_numbers(unbroken):
    from tensorboardX.proto.event_pb2 import Event
    [file] = (unbroken / "tensorboard").iterdir()
    data, place, found = file.read_bytes(), 0, {}
    while place < len(data):  # length (8 bytes) and its sum (4), event, sum (4)
        size = int.from_bytes(data[place:place + 8], "little")
        event = Event.FromString(data[place + 12:place + 12 + size])
        found |= {event.step: value.simple_value for value in event.summary.value if value.tag == "train/loss"}
        place += size + 16
    assert found == {step: pytest.approx(line["loss"]) for step, line in records(unbroken).items()}


def test_a_run_stopped_anywhere_again_and_again_equals_an_unbroken_one(config, unbroken, tmp_path, monkeypatch):
    def stop_after(owner, name, step):
        """The run stops as if killed when `owner.name(step)` has been done."""
        original = getattr(owner, name)

        def method(self, number, *rest):
            original(self, number, *rest)
            if number == step:
                raise Killed

        monkeypatch.setattr(owner, name, method)

    for owner, name, step in [(RunLog, "training", 3), (Checkpoints, "save", 5), (RunLog, "training", 9),
                              (RunLog, "validation", 15), (Checkpoints, "save", 30)]:
        with monkeypatch.context():
            stop_after(owner, name, step)
            with pytest.raises(Killed):
                adapt(config, tmp_path / "run")
            monkeypatch.undo()
    adapt(config, tmp_path / "run")
    assert records(tmp_path / "run") == records(unbroken)
    assert records(tmp_path / "run", "validation.jsonl") == records(unbroken, "validation.jsonl")
    assert same_weights(tmp_path / "run", unbroken)


def command(tiny_config, tiny_run, workdir: Path) -> list[str]:
    return [sys.executable, "-m", "dlm_jax.cli", "train", "--config", str(tiny_config), "--workdir", str(workdir),
            *(f"--config.{override}" for override in tiny_run)]


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
    """Returns when the run has logged `step`."""
    end = time.monotonic() + PATIENCE
    log = workdir / "metrics.jsonl"
    while not (log.exists() and log.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_run_killed_by_the_system_and_started_again_equals_an_unbroken_one(tiny_config, tiny_run, unbroken, tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen(command(tiny_config, tiny_run, workdir), stderr=subprocess.PIPE) as process:
        wait_for_step(process, workdir, 12)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (workdir / "checkpoints" / "5").exists() and len(records(workdir)) < 30
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')  # as a kill in mid-line leaves it
    again = subprocess.run(command(tiny_config, tiny_run, workdir), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert records(workdir) == records(unbroken)
    assert records(workdir, "validation.jsonl") == records(unbroken, "validation.jsonl")
    assert same_weights(workdir, unbroken)


def test_ctrl_c_ends_a_run_with_one_line_and_code_130(tiny_config, tiny_run, tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen(command(tiny_config, tiny_run, workdir), stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"TERM": "dumb"}) as process:
        wait_for_step(process, workdir, 6)
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
    assert process.returncode == 130
    assert said.endswith("dlm: interrupted\n") and "Traceback" not in said


def test_a_finished_run_started_again_does_nothing_and_says_so(config, finished, unbroken, capsys):
    outcome = adapt(config, finished)
    assert "is finished at step 30" in capsys.readouterr().err
    assert outcome.nelbo_after == records(unbroken, "validation.jsonl")[30]["nelbo"]
    for file in ("metrics.jsonl", "validation.jsonl", "config.json", "model.json"):
        assert (finished / file).read_bytes() == (unbroken / file).read_bytes()


def test_a_run_may_be_made_longer_and_log_otherwise(tiny_config, tiny_run, finished):
    longer = [*tiny_run, "train.steps=36", "log.every=3", "checkpoint.every=4", "checkpoint.keep=1", "evaluate.every=5"]
    adapt(load_config(tiny_config, longer), finished)
    assert list(records(finished)) == [*range(1, 31), 33, 36]
    assert list(records(finished, "validation.jsonl")) == [0, 15, 30, 35, 36]


@pytest.mark.parametrize("change", ["train.batch=2", "train.seed=1", "optimizer.learning_rate=0.1",
                                    "model.init=scratch", "recipe.anneal_steps=3", "data.validation_records=4",
                                    "recipe.t_min=0.1"])
def test_a_run_may_not_become_another(tiny_config, tiny_run, finished, change):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    key = change.split("=")[0]
    with pytest.raises(UserError, match=rf"holds a run with {key} = .*; choose another work directory"):
        adapt(load_config(tiny_config, [*tiny_run, change]), finished)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_run_does_not_go_back(tiny_config, tiny_run, finished):
    with pytest.raises(UserError, match="is at step 30, beyond train.steps = 20"):
        adapt(load_config(tiny_config, [*tiny_run, "train.steps=20"]), finished)
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 30


def test_a_loss_that_is_no_number_ends_the_run_before_it_is_saved(tiny_config, tiny_run, tmp_path):
    wild = load_config(tiny_config, [*tiny_run, "optimizer.learning_rate=1e30", "log.every=30", "optimizer.warmup=0"])
    with pytest.raises(UserError, match=r"is (nan|inf) at step 5; start anew .* lower optimizer.learning_rate"):
        adapt(wild, tmp_path / "run")
    assert not (tmp_path / "run").exists()
