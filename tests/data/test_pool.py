"""Preparing on many cores gives the same bytes in bounded memory, and a kill leaves no files and no processes."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dlm_jax.data.pool import AHEAD, encode_in_processes
from dlm_jax.data.prepare import prepare
from dlm_jax.data.text import read_documents
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

module = importlib.import_module("dlm_jax.data.prepare")  # `dlm_jax.data.prepare` itself is the function


@pytest.fixture(scope="module")
def tokenizer(base):
    return Tokenizer.load(base)


def files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("processes", [2, 5])
def test_the_files_do_not_depend_on_the_number_of_processes(tmp_path, tokenizer, texts, monkeypatch, processes):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 7)
    monkeypatch.setattr(module, "SHARD_BYTES", 8 * 16 * 20)
    prepare(read_documents([texts]), tokenizer, 16, tmp_path / "one")
    prepare(read_documents([texts]), tokenizer, 16, tmp_path / "many", processes=processes)
    one, many = files(tmp_path / "one"), files(tmp_path / "many")
    assert len(one) > 3 and one == many


def test_texts_are_read_only_slightly_ahead(tokenizer):
    read = []

    def groups():
        for number in range(100):
            read.append(number)
            yield ["a text", "and one more"], 18

    encoded = encode_in_processes(groups(), tokenizer.backend, 2)
    for done in range(1, 10):
        ids, size = next(encoded)
        assert [each.tolist() for each in ids] == tokenizer.encode_batch(["a text", "and one more"]) and size == 18
        assert len(read) <= done + AHEAD * 2
    encoded.close()


def children(pid: int) -> set[int]:
    """The running child processes of `pid`, whichever of its threads started them."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return {int(child) for task in tasks for child in task.read_text().split()}


def alive(pid: int) -> bool:
    """Whether the process is running; a zombie is not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(happened) -> None:
    end = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < end, "it did not happen within a minute"
        time.sleep(0.05)


ENDLESS = """
import importlib, sys
from dlm_jax.data import Tokenizer, prepare
from dlm_jax.errors import UserError
def documents():
    while True:
        yield "a cat ran on the mat. " * 50
if __name__ == "__main__":
    importlib.import_module("dlm_jax.data.prepare").SHARD_BYTES = 8 * 16 * 100
    try:
        prepare(documents(), Tokenizer.load(sys.argv[1]), 16, sys.argv[2], processes=2)
    except UserError as error:
        sys.exit(str(error))
"""


@pytest.fixture
def running(base, tmp_path):
    """Starts preparing endless text into `out` with two processes, and waits until both run and a shard is written."""
    script = tmp_path / "endless.py"
    script.write_text(ENDLESS)
    started = []

    def start():
        run = subprocess.Popen([sys.executable, script, base, tmp_path / "out"], stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
        started.append(run)
        wait_until(lambda: list(tmp_path.glob(".out.*/records-00001.array_record")) and len(children(run.pid)) >= 2)
        return run

    yield start
    for run in started:
        run.kill()
        run.communicate()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_no_process_and_the_next_run_deletes_its_files(tmp_path, tokenizer, running, how):
    run = running()
    helpers = children(run.pid)
    run.send_signal(how)
    assert run.wait(timeout=60) == -how
    wait_until(lambda: not any(map(alive, helpers)))
    assert not (tmp_path / "out").exists() and list(tmp_path.glob(".out.*.partial"))
    prepare(["a mat"], tokenizer, 16, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"endless.py", "out"}


def test_the_files_of_a_running_process_are_not_deleted(tmp_path, tokenizer, running):
    running()
    partial, = tmp_path.glob(".out.*.partial")
    prepare(["a mat"], tokenizer, 16, tmp_path / "out")
    assert (partial / "records-00000.array_record").exists()


def test_a_keyboard_interrupt_leaves_nothing(tmp_path, running):
    run = running()
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to its child processes, too
    _, output = run.communicate(timeout=60)
    assert output.count("Traceback") == 1 and output.rstrip().endswith("KeyboardInterrupt")
    assert {path.name for path in tmp_path.iterdir()} == {"endless.py"}


def test_a_killed_worker_process_is_reported_and_leaves_nothing(tmp_path, running):
    run = running()
    for helper in children(run.pid):
        os.kill(helper, signal.SIGKILL)
    _, output = run.communicate(timeout=60)
    assert "was killed, most likely for lack of memory" in output
    assert {path.name for path in tmp_path.iterdir()} == {"endless.py"}


def test_a_source_that_breaks_off_is_not_taken_for_a_killed_worker(tokenizer):
    def groups():
        yield ["a text"], 6
        raise ConnectionResetError("the store hung up")

    with pytest.raises(ConnectionResetError, match="the store hung up"):
        list(encode_in_processes(groups(), tokenizer.backend, 2))


def test_bad_text_is_reported_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 1)
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 9 + '{"text": bad}\n')
    with pytest.raises(UserError, match="a.jsonl, line 10 is not JSON"):
        prepare(read_documents([tmp_path / "a.jsonl"]), tokenizer, 16, tmp_path / "out", processes=2)
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl"}
