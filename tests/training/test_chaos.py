"""Whatever happens to a run, the same command resumes it, and it logs what an uninterrupted run logs, bit for bit."""

import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dlm_jax.runs.workdir import checkpoint_steps

pytestmark = pytest.mark.usefixtures("compiled_once")


def truncate_newest(workdir: Path) -> bool:
    """Truncates the largest file of the newest checkpoint, if there is a previous one to fall back to."""
    finished = [workdir / "checkpoints" / str(step) for step in checkpoint_steps(workdir)]
    if len(finished) < 2:
        return False
    largest = max((file for file in finished[-1].rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])
    return True


def progress(workdir: Path) -> int:
    """The number of lines in the log."""
    log = workdir / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_with_truncated_checkpoints_equals_an_uninterrupted_one(
        runs, seed, tiny_config, tiny_run, unbroken, tmp_path):
    chance, workdir, damages, kills = random.Random(seed), tmp_path / "run", 0, 0
    run = [*runs.command(tiny_config, tiny_run, workdir), "--config.checkpoint.every=2"]
    for attempt in range(30):
        with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
            target = progress(workdir) + chance.randrange(1, 12)
            while process.poll() is None and progress(workdir) < target and attempt < 8:
                time.sleep(0.002)
            if process.poll() is None and attempt < 8:
                time.sleep(0.05 * chance.random())  # into a save, a validation or a log line
                process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
                kills += 1
            said = process.stderr.read()
        assert process.returncode in (0, -signal.SIGKILL, 143), said
        if process.returncode == 0:
            break
        if chance.random() < 0.5:
            damages += truncate_newest(workdir)
    assert process.returncode == 0 and kills > 1
    assert runs.records(workdir) == runs.records(unbroken) and runs.same_weights(workdir, unbroken)
    assert runs.records(workdir, "validation.jsonl") == runs.records(unbroken, "validation.jsonl")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes, if one can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", place], capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("needs the right to mount a small file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.slow
def test_a_run_whose_disk_was_full_resumes_once_there_is_space(runs, tiny_config, tiny_run, unbroken, small_disk):
    ballast = small_disk / "ballast"
    run = [*runs.command(tiny_config, tiny_run, small_disk / "run"), "--config.checkpoint.every=3"]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and progress(small_disk / "run") < 7:
            time.sleep(0.002)
        filled = subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=4096"], capture_output=True)
        assert filled.returncode != 0
        said = process.stderr.read()
    assert process.returncode == 2 and "cannot continue: No space left" in said, said
    ballast.unlink()
    again = subprocess.run(run, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert runs.records(small_disk / "run") == runs.records(unbroken)
    assert runs.same_weights(small_disk / "run", unbroken)

