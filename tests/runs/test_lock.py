"""One writer at a time: who holds a work directory keeps it, and who is dead does not."""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import fsspec
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.errors import UserError
from dlm_jax.runs import lock
from dlm_jax.runs.lock import check_lock, locked
from dlm_jax.runs.places import LockFile, LockObject
from dlm_jax.runs.workdir import claimed
from dlm_jax.training.metrics import RunLog

SHORT = ["train.steps=6", "checkpoint.every=3", "evaluate.every=6", "recipe.anneal_steps=0"]
IN_USE = r"is in use by process \d+ on .*, since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait for that run to end, stop it,"
HOLD = ("import pathlib, sys, time\nfrom dlm_jax.runs.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(100)\n")


@pytest.fixture
def quick(monkeypatch):
    """A lock that beats, and whose holder is given up, within a second."""
    for name, seconds in {"BEAT": 0.02, "SILENCE": 0.4, "SETTLE": 0.02}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture(params=["directory", "store"])
def elsewhere(request, quick, monkeypatch, tmp_path):
    """A work directory, as `locked` takes it, whose lock no kernel keeps."""
    def no_flock(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", no_flock)
    yield (tmp_path / "run", f"memory://{tmp_path.name}/run" if request.param == "store" else None)
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("memory").rm(tmp_path.name, recursive=True)


def written_by(host: str, kernel: bool = True) -> str:
    """The lock of a process on `host` that does not beat."""
    return json.dumps({"pid": 1, "host": host, "started": "2020-02-20T20:20:20", "kernel": kernel, "beats": 1})


def losses(workdir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_first_trains_as_if_alone(tiny_config, tiny_run, tmp_path, compiled_once):
    workdir = tmp_path / "run"
    command = [sys.executable, "-m", "dlm_jax", "train", "--config", str(tiny_config), "--workdir", str(workdir),
               *(f"--config.{override}" for override in [*tiny_run, *SHORT])]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        while first.poll() is None and not (workdir / "config.json").exists():
            time.sleep(0.002)
        first.send_signal(signal.SIGSTOP)  # in the middle of its start, and alive
        second = subprocess.run(command, capture_output=True, text=True)
        first.send_signal(signal.SIGCONT)
        first.communicate()
    sentence = f"dlm: {workdir} is in use by process {first.pid} on {socket.gethostname()}, since "
    assert second.returncode == 2 and second.stderr.startswith(sentence) and second.stderr.count("\n") == 1
    assert first.returncode == 0 and not (workdir / "lock").exists()
    adapt(load_config(tiny_config, [*tiny_run, *SHORT]), tmp_path / "alone")
    assert losses(workdir) == losses(tmp_path / "alone") and len(losses(workdir)) == 6


def test_the_lock_says_who_holds_it_and_a_killed_holder_is_taken_over_at_once(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        record = json.loads((tmp_path / "lock").read_text())
        assert (record["pid"], record["host"]) == (holder.pid, socket.gethostname())
        assert abs((datetime.now(UTC) - datetime.fromisoformat(record["started"])).total_seconds()) < 60
        with pytest.raises(UserError, match=f"is in use by process {holder.pid} on "), locked(tmp_path):
            pass
        holder.kill()
    assert (tmp_path / "lock").exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_holder_that_no_kernel_vouches_for_is_alive_while_it_beats(elsewhere):
    with locked(*elsewhere):
        with pytest.raises(UserError, match=IN_USE), locked(*elsewhere):
            pass
        check_lock(elsewhere[0])
    with locked(*elsewhere):
        pass


def test_a_holder_that_was_taken_over_learns_it_and_leaves_the_lock(elsewhere):
    workdir, url = elsewhere
    place = LockObject(url) if url else LockFile(workdir)
    with pytest.raises(UserError, match=f"{place.name} is in use by process 1 on another, since "):
        with locked(workdir, url):
            place.write(written_by("another"))
            time.sleep(5 * lock.BEAT)
            check_lock(workdir)
    assert place.read() == written_by("another")


def test_a_run_that_was_taken_over_writes_no_checkpoint(tiny_config, tiny_run, tmp_path, monkeypatch, compiled_once):
    workdir = tmp_path / "run"
    monkeypatch.setattr(RunLog, "training", lambda *_: (workdir / "lock").write_text(written_by("another")))
    with pytest.raises(UserError, match="is in use by process 1 on another, since "):
        adapt(load_config(tiny_config, [*tiny_run, *SHORT]), workdir)
    assert not list((workdir / "checkpoints").iterdir()) and (workdir / "config.json").exists()
    assert (workdir / "lock").read_text() == written_by("another")


@pytest.mark.parametrize("host, kernel", [("another", True), (socket.gethostname(), False)])
def test_a_holder_unknown_to_this_kernel_is_watched_before_it_is_taken_over(quick, tmp_path, capsys, host, kernel):
    (tmp_path / "lock").write_text(written_by(host, kernel))
    begin = time.monotonic()
    with locked(tmp_path):
        assert time.monotonic() - begin >= lock.SILENCE
    assert f"is locked by process 1 on {host}, since " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["mine", "[]", '{"pid": 1}'])
def test_a_file_named_lock_that_is_none_is_left_alone(tmp_path, text):
    (tmp_path / "lock").write_text(text)
    with pytest.raises(UserError, match="is not the lock of a run; name another directory"), locked(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == text
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").symlink_to(tmp_path / "lock")
    with pytest.raises(OSError), locked(tmp_path / "run"):
        pass
    assert (tmp_path / "lock").read_text() == text


def test_a_failed_start_leaves_nothing_and_the_lock_of_a_killed_one_counts_as_nothing(tiny_config, tiny_run, tmp_path):
    config = load_config(tiny_config, tiny_run)
    with pytest.raises(KeyError), claimed(tmp_path / "run", config):
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "config.json"}
        raise KeyError
    assert not (tmp_path / "run").exists()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "lock").write_text(written_by(socket.gethostname()))
    with claimed(tmp_path / "killed", config):
        pass
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {"config.json"}


def test_a_store_has_one_writer_and_its_lock_is_not_mirrored(quick, tiny_config, tiny_run, tmp_path, monkeypatch,
                                                             compiled_once):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, url = load_config(tiny_config, [*tiny_run, *SHORT]), f"file://{tmp_path}/bucket/run"
    with locked(tmp_path / "mirror", url):
        with pytest.raises(UserError, match=IN_USE):
            adapt(config, url)
    assert not (tmp_path / "bucket" / "run").exists()
    with pytest.raises(UserError, match="there is no nowhere.txt"):
        adapt(load_config(tiny_config, [*tiny_run, *SHORT, "data.train=nowhere.txt"]), url)
    assert not (tmp_path / "bucket" / "run").exists()
    adapt(config, url)
    assert not [path for path in tmp_path.rglob("lock")] and len(losses(tmp_path / "bucket" / "run")) == 6
    shutil.rmtree(tmp_path / "cache")
