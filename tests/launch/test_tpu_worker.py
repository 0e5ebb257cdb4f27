"""launch/tpu_worker.sh, which runs on the workers; here in a temporary home directory."""

import os
import subprocess
import time
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[2] / "launch" / "tpu_worker.sh"


@pytest.fixture
def worker(tmp_path):
    """Calls a verb of the script and returns its output."""
    def call(*arguments: str) -> str:
        return subprocess.run(["bash", str(WORKER), *arguments], env=os.environ | {"HOME": str(tmp_path)}, text=True,
                              capture_output=True, check=True, timeout=20).stdout.strip()

    yield call
    call("start", "true")  # terminates whatever a test has left running


def test_a_run_is_followed_to_its_exit_code(worker):
    assert worker("status") == "gone"
    worker("start", "sh", "-c", 'echo "$0"; echo "$PYTHONUNBUFFERED" >&2; exit 3', "it's $HOME")
    shown = worker("follow")
    assert shown == "it's $HOME\n1"
    assert worker("status") == "3"


def test_a_run_outlives_the_call_that_started_it_and_is_terminated_by_the_next_start(worker, tmp_path):
    worker("start", "sleep", "60")
    first = int((tmp_path / "dlm-run" / "pid").read_text())
    assert worker("status") == "running"
    worker("start", "true")
    with pytest.raises(ProcessLookupError):
        os.killpg(first, 0)
    until = time.monotonic() + 10
    while worker("status") == "running" and time.monotonic() < until:
        time.sleep(0.1)
    assert worker("status") == "0"


def test_a_recreated_machine_has_lost_the_run(worker, tmp_path):
    (tmp_path / "dlm-run").mkdir()
    ended = subprocess.Popen(["true"])
    ended.wait()
    (tmp_path / "dlm-run" / "pid").write_text(str(ended.pid))
    assert worker("status") == "gone"
