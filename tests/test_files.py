"""A directory has its name only when it is complete and on disk, and what a killed writer left does not stay."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dlm_jax import files
from dlm_jax.errors import UserError
from dlm_jax.files import new_directory

WRITER = """
import sys, time
from dlm_jax.files import new_directory
with new_directory(sys.argv[1]) as directory:
    (directory / "weights").write_text("half of them")
    print(directory, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def writer(tmp_path):
    """A process that is writing `tmp_path/out`, and the directory that it writes into."""
    command = [sys.executable, "-c", WRITER, tmp_path / "out"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process, Path(process.stdout.readline().strip())
        process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_what_a_killed_writer_left_is_deleted_by_the_next_writer_of_that_name(tmp_path, writer, how):
    process, left = writer
    process.send_signal(how)
    assert process.wait() == -how and left.is_dir() and not (tmp_path / "out").exists()
    with new_directory(tmp_path / "other"):
        pass
    assert left.is_dir()
    with new_directory(tmp_path / "out"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {"out", "other"}


def test_what_a_living_process_writes_is_left_alone(tmp_path, writer):
    with new_directory(tmp_path / "out"):
        pass
    assert (writer[1] / "weights").read_text() == "half of them"


def test_writers_of_one_name_at_the_same_time_do_not_take_each_other_for_leftovers(tmp_path):
    def write(name: str) -> None:
        try:
            with new_directory(tmp_path / "out") as directory:
                (directory / name).write_text(name)
        except UserError as error:
            refusals.append(str(error))

    for _ in range(20):
        refusals: list[str] = []
        writers = [threading.Thread(target=write, args=(str(i),)) for i in range(8)]
        for each in writers:
            each.start()
        for each in writers:
            each.join()
        [written] = (tmp_path / "out").iterdir()
        assert written.read_text() == written.name and len(refusals) == 7
        assert all("No such file" not in refusal for refusal in refusals)
        written.unlink()


def test_files_and_directories_are_on_disk_before_the_name_exists(tmp_path, monkeypatch):
    synced = []

    def fsync(handle: int) -> None:
        synced.append((Path(os.readlink(f"/proc/self/fd/{handle}")), (tmp_path / "out").exists()))

    monkeypatch.setattr(files.os, "fsync", fsync)
    with new_directory(tmp_path / "out") as directory:
        (directory / "inner").mkdir()
        (directory / "inner" / "weights").write_text("all of them")
    assert synced[:-1] == [(directory / "inner", False), (directory / "inner" / "weights", False), (directory, False)]
    assert synced[-1] == (tmp_path, True)


def test_a_disk_that_fails_to_write_is_reported_and_nothing_gets_the_name(tmp_path, monkeypatch):
    def fsync(handle: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(UserError, match="cannot write .*out: Input/output error"):
        with new_directory(tmp_path / "out") as directory:
            (directory / "weights").write_text("all of them")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_block_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), new_directory(tmp_path / "out") as directory:
        (directory / "weights").write_text(str(1 / 0))
    assert list(tmp_path.iterdir()) == []
