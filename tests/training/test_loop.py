"""A run is a function of its config: however and however often it is stopped, it leaves the same record."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import textwrap

import pytest

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.errors import UserError
from dlm_jax.training.checkpoint import Checkpoints
from dlm_jax.training.goodput import GoodputClock
from dlm_jax.training.metrics import NoLog, RunLog
from dlm_jax.training.progress import ProgressBar
from dlm_jax.training.recorder import Recorder

pytestmark = pytest.mark.usefixtures("compiled_once")


class Killed(BaseException):
    """Stops a run in a way that no handler is meant to catch."""


@pytest.fixture
def finished(unbroken, tmp_path):
    """A copy of the uninterrupted run."""
    return shutil.copytree(unbroken, tmp_path / "run")


def test_a_run_logs_every_step_once_with_its_validations_and_tensorboard_files(runs, unbroken):
    assert list(runs.records(unbroken)) == list(range(1, 31))
    assert list(runs.records(unbroken, "validation.jsonl")) == [0, 15, 30]
    assert sum(file.stat().st_size for file in (unbroken / "tensorboard").iterdir()) > 1000


def test_tensorboard_holds_the_same_numbers(runs, unbroken):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [file] = (unbroken / "tensorboard").iterdir()
    board = EventAccumulator(str(file)).Reload()
    found = {event.step: event.value for event in board.Scalars("train/loss")}
    assert found == {step: pytest.approx(line["loss"]) for step, line in runs.records(unbroken).items()}


def test_a_run_stopped_anywhere_again_and_again_equals_an_uninterrupted_one(runs, config, unbroken, tmp_path,
                                                                            monkeypatch):
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
    assert runs.records(tmp_path / "run") == runs.records(unbroken)
    assert runs.records(tmp_path / "run", "validation.jsonl") == runs.records(unbroken, "validation.jsonl")
    assert runs.same_weights(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_a_run_killed_by_the_system_and_rerun_equals_an_uninterrupted_one(
        runs, tiny_config, tiny_run, unbroken, tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen(runs.command(tiny_config, tiny_run, workdir), stderr=subprocess.PIPE) as process:
        runs.wait_for_step(process, workdir, 12)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert (workdir / "checkpoints" / "5").exists() and len(runs.records(workdir)) < 30
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "lo')  # as a kill in the middle of a line leaves it
    again = subprocess.run(runs.command(tiny_config, tiny_run, workdir), capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert runs.records(workdir) == runs.records(unbroken)
    assert runs.records(workdir, "validation.jsonl") == runs.records(unbroken, "validation.jsonl")
    assert runs.same_weights(workdir, unbroken)


def test_a_finished_run_that_is_rerun_does_nothing_and_reports_that(runs, config, finished, unbroken, capsys):
    outcome = adapt(config, finished)
    assert "is finished at step 30" in capsys.readouterr().err
    assert outcome.nelbo_after == runs.records(unbroken, "validation.jsonl")[30]["nelbo"]
    for file in ("metrics.jsonl", "validation.jsonl", "config.json", "model.json"):
        assert (finished / file).read_bytes() == (unbroken / file).read_bytes()


def test_a_run_may_be_extended_and_log_differently(runs, tiny_config, tiny_run, finished):
    longer = [*tiny_run, "train.steps=36", "log.every=3", "checkpoint.every=4", "checkpoint.keep=1", "evaluate.every=5"]
    adapt(load_config(tiny_config, longer), finished)
    assert list(runs.records(finished)) == [*range(1, 31), 33, 36]
    assert list(runs.records(finished, "validation.jsonl")) == [0, 15, 30, 35, 36]


def test_a_run_with_a_bfloat16_moment_resumes_where_it_was(runs, tiny_config, tiny_run, tmp_path):
    def run(name, steps):
        overrides = ["optimizer.first_moment_dtype=bfloat16", "optimizer.schedule=constant", f"train.steps={steps}"]
        adapt(load_config(tiny_config, [*tiny_run, *overrides]), tmp_path / name)

    for name, steps in (("whole", 8), ("extended", 5), ("extended", 8)):
        run(name, steps)
    assert runs.records(tmp_path / "whole") == runs.records(tmp_path / "extended")
    assert runs.same_weights(tmp_path / "whole", tmp_path / "extended")


@pytest.mark.parametrize("change", ["train.global_batch_size=2", "train.seed=1", "optimizer.learning_rate=0.1",
                                    "model.init=scratch", "recipe.anneal_steps=3", "data.validation_records=4",
                                    "recipe.t_min=0.1"])
def test_a_run_may_not_turn_into_another(tiny_config, tiny_run, finished, change):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    key = change.split("=")[0]
    with pytest.raises(UserError, match=rf"holds a run with {key} = .*; choose another work directory"):
        adapt(load_config(tiny_config, [*tiny_run, change]), finished)
    assert before == {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}


def test_a_run_does_not_go_back(tiny_config, tiny_run, finished):
    with pytest.raises(UserError, match="is at step 30, beyond train.steps = 20"):
        adapt(load_config(tiny_config, [*tiny_run, "train.steps=20"]), finished)
    assert json.loads((finished / "config.json").read_text())["train"]["steps"] == 30


def test_a_run_of_non_finite_losses_ends_without_saving_a_skipped_step(tiny_config, tiny_run, tmp_path, capsys):
    diverging = load_config(tiny_config, [*tiny_run, "optimizer.learning_rate=1e30", "log.every=1",
                                          "optimizer.warmup_steps=0", "optimizer.max_skipped_steps=6"])
    with pytest.raises(UserError, match=r"non-finite 7 times in a row, more than optimizer.max_skipped_steps = 6; "):
        adapt(diverging, tmp_path / "run")
    assert "step 5: non-finite loss or gradient; skipped 4 in a row" in capsys.readouterr().err
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_ends_with_no_finite_nelbo_is_an_error_and_keeps_its_checkpoint(tiny_config, tiny_run, tmp_path,
                                                                                   monkeypatch):
    monkeypatch.setattr("dlm_jax.training.run.likelihood", lambda *arguments: float("nan"))
    short = [*tiny_run, "recipe.anneal_steps=0", "train.steps=3", "checkpoint.every=2", "checkpoint.keep=1"]
    with pytest.raises(UserError, match="the validation NELBO after the last step is nan; start over"):
        adapt(load_config(tiny_config, short), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_request_to_stop_saves_that_step_and_the_same_command_resumes(how, runs, tiny_config, tiny_run, unbroken,
                                                                        tmp_path):
    workdir = tmp_path / "run"
    with subprocess.Popen(runs.command(tiny_config, tiny_run, workdir), stderr=subprocess.PIPE, text=True) as process:
        runs.wait_for_step(process, workdir, 7)
        process.send_signal(how)
        said = process.stderr.read()
    step = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert process.returncode == 128 + how
    assert ("press Ctrl-C again" in said) == (how == signal.SIGINT)
    assert said.endswith(f"dlm: the run was asked to stop and is saved at step {step} in "
                         f"{workdir / 'checkpoints'}; rerun the same command to resume\n")
    resumed = subprocess.run(runs.command(tiny_config, tiny_run, workdir), capture_output=True, text=True)
    assert resumed.returncode == 0 and f"resuming {workdir} after step {step} of 30\n" in resumed.stderr
    assert runs.records(workdir) == runs.records(unbroken) and runs.same_weights(workdir, unbroken)


def test_the_second_interrupt_ends_the_process_at_once():
    program = "import os, signal\nfrom dlm_jax.training.watchdog import stop_request\nwith stop_request() as stop:\n" \
              "    os.kill(os.getpid(), signal.SIGINT)\n    print(stop.at(1), flush=True)\n" \
              "    os.kill(os.getpid(), signal.SIGINT)\n    print('unreachable')\n"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "True\n" and "KeyboardInterrupt" in result.stderr


def test_the_host_is_at_most_one_step_ahead_of_the_device_however_rarely_it_logs(config):
    finished = []

    class Metric:
        def __init__(self, step):
            self.step = step

        def block_until_ready(self):
            finished.append(self.step)
            return self

    rare = dataclasses.replace(config, log=dataclasses.replace(config.log, every=1000))
    with ProgressBar(rare) as bar:
        recorder = Recorder(rare, NoLog(), bar, GoodputClock(), throughput=lambda seconds: {})
        for step in range(1, 6):
            recorder.record(step, {"loss": Metric(step)})
            assert finished == list(range(1, step))


def test_checkpoints_are_also_saved_by_time(tiny_config, tiny_run, tmp_path):
    often = ["checkpoint.every=1000", "checkpoint.minutes=1e-6", "checkpoint.keep=99", "log.every=6", "train.steps=12"]
    adapt(load_config(tiny_config, [*tiny_run, *often]), tmp_path / "run")
    assert sorted(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir()) == [6, 12]


def test_samples_are_written_at_every_validation(tiny_config, tiny_run, tmp_path):
    adapt(load_config(tiny_config, [*tiny_run, "evaluate.num_samples=2", "train.steps=15"]), tmp_path / "run")
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in samples] == [0, 15]
    assert all(len(line["texts"]) == 2 and all(isinstance(text, str) for text in line["texts"]) for line in samples)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    [file] = (tmp_path / "run" / "tensorboard").iterdir()
    shown = EventAccumulator(str(file)).Reload().Tensors("samples/1")
    assert [(event.step, event.tensor_proto.string_val[0].decode()) for event in shown] == [
        (line["step"], textwrap.indent(line["texts"][1], "    ")) for line in samples]


def test_a_validation_is_shown_with_its_step_and_only_there(config, capsys):
    with ProgressBar(config) as bar:
        bar.validated(15, 9.0)
        bar.report(30, {"loss": 4.0, "tokens_per_second": 1.0})
        assert bar._bar.tasks[0].fields["figures"] == "loss 4.000  validation 9.000 at 15  1 tokens/s"
        bar.validated(30, 3.5)
        assert bar._bar.tasks[0].fields["figures"] == "loss 4.000  validation 3.500 at 30  1 tokens/s"
    assert capsys.readouterr().err.splitlines() == [
        "step 15/30  validation 9.0000 nats/token", "step 30/30  loss 4.000  1 tokens/s",
        "step 30/30  validation 3.5000 nats/token"]


def test_a_profile_of_the_requested_steps_is_written(config, tmp_path):
    adapt(config, tmp_path / "run", profile_steps=(3, 4))
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))


def test_weights_and_biases_gets_the_numbers_of_the_log(runs, tiny_config, tiny_run, tmp_path, monkeypatch):
    (tmp_path / "wandb.py").write_text(
        "import json\nlines = []\ndef init(**settings):\n    lines.append(settings)\n    return Run()\n"
        "class Run:\n    def log(self, values, step):\n        lines.append((step, values))\n"
        "    def finish(self):\n        lines.append('finished')\n")
    monkeypatch.syspath_prepend(tmp_path)
    adapt(load_config(tiny_config, [*tiny_run, "log.wandb=stories", "train.steps=5"]), tmp_path / "run")
    import wandb
    begin, *lines, end = wandb.lines
    assert begin["project"] == "stories" and begin["config"]["train"]["steps"] == 5 and end == "finished"
    losses = {step: values["train/loss"] for step, values in lines if "train/loss" in values}
    assert losses == {step: line["loss"] for step, line in runs.records(tmp_path / "run").items()}


def test_weights_and_biases_without_its_package_is_refused(tiny_config, tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="log.wandb needs the package wandb: pip install wandb"):
        adapt(load_config(tiny_config, [*tiny_run, "log.wandb=stories"]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_step_that_hangs_dumps_the_stack_of_every_thread():
    program = "import time\nfrom dlm_jax.training.watchdog import watchdog\nwith watchdog(0.2) as alive:\n" \
              "    alive()\n    time.sleep(0.1)\n    alive()\n    time.sleep(0.5)\n"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0 and "Timeout (0:00:00.2" in result.stderr and "line 7 in <module>" in result.stderr


def test_every_second_of_a_run_is_charged_to_one_kind(monkeypatch):
    from dlm_jax.training import goodput
    now = iter([0, 2, 3, 5, 9, 10, 20, 21.0])
    monkeypatch.setattr(goodput.time, "perf_counter", lambda: next(now))
    run = goodput.GoodputClock()
    run.begin(4)
    for kind in ("data", "host", "device", "saving", "validation"):
        run.spend(kind)
    assert run.per_step(6) == {"seconds_per_step": 3.5, "data_seconds": 0.5, "host_seconds": 1.0}
    assert run.elapsed() == 21 and run.goodput() == 7 / 21
