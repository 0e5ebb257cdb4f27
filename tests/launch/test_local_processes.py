"""launch/local_processes.py, tested with small programs that do not need jax."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = [sys.executable, str(Path(__file__).parents[2] / "launch" / "local_processes.py")]
WAIT = "import signal, time; print('ready', flush=True); time.sleep(60)"


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, timeout=30)


def program(code: str, processes: int = 2) -> list[str]:
    """The arguments that run a Python program, in which `os`, `sys` and the process index `me` are defined."""
    return ["--processes", str(processes), "--", sys.executable, "-c",
            f"import os, sys; me = int(os.environ['DLM_PROCESS'])\n{code}"]


def test_every_process_gets_the_coordinator_and_its_index():
    code = "print(os.environ['DLM_COORDINATOR'], os.environ['DLM_PROCESSES'], me, os.environ['XLA_FLAGS'])"
    done = run("--devices-per-process", "4", *program(code, processes=3))
    lines = sorted(done.stdout.splitlines())
    assert done.returncode == 0 and [line[:4] for line in lines] == ["[0] ", "[1] ", "[2] "]
    coordinators = {line.split()[1] for line in lines}
    assert len(coordinators) == 1 and coordinators.pop().startswith("127.0.0.1:")
    assert all("device_count=4" in line and f" 3 {i} " in line for i, line in enumerate(lines))


def test_every_line_of_stdout_and_stderr_is_prefixed_with_the_process_index():
    done = run(*program("print('out'); print('err', file=sys.stderr); print('last', end='')"))
    expected = [f"[{i}] {word}" for i in range(2) for word in ("err", "last", "out")]
    assert sorted(done.stdout.splitlines()) == expected


def test_the_first_failure_terminates_the_others_and_sets_the_exit_code():
    start = time.monotonic()
    done = run(*program(f"if me == 1: sys.exit(5)\n{WAIT}", processes=3))
    assert done.returncode == 5 and time.monotonic() - start < 10


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace_period():
    ignore_sigterm = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    code = f"if me == 1: __import__('time').sleep(0.5); sys.exit(6)\n{ignore_sigterm}\n{WAIT}"
    done = run("--grace", "0.3", *program(code))
    assert done.returncode == 6


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_forwarded_to_all_processes(number, code):
    program_code = f"import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)\n{WAIT}"
    with subprocess.Popen([*SCRIPT, *program(program_code)], stdout=subprocess.PIPE, text=True) as running:
        ready = {running.stdout.readline().strip() for _ in range(2)}
        running.send_signal(number)
        assert ready == {"[0] ready", "[1] ready"} and running.wait(timeout=20) == code


def test_processes_may_shut_down_cleanly_after_a_signal():
    code = "import signal; signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n" + WAIT
    with subprocess.Popen([*SCRIPT, *program(code)], stdout=subprocess.PIPE, text=True) as running:
        for _ in range(2):
            running.stdout.readline()
        running.terminate()
        out, _ = running.communicate(timeout=20)
        assert sorted(out.split("\n")) == ["", "[0] saved", "[1] saved"] and running.returncode == 0


def test_a_dry_run_prints_one_command_per_process():
    done = run("--processes", "2", "--config", "a b.py", "--workdir", "w", "--dry-run", "--", "--config.train.steps=10")
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 and all(line[0] == "env" and f"DLM_PROCESS={i}" in line for i, line in enumerate(lines))
    train = ["train", "--config", "a b.py", "--workdir", "w", "--config.train.steps=10"]
    assert all(line[-6:] == train for line in lines)


@pytest.mark.parametrize("arguments, reason", [
    ((), "--processes"),
    (("--processes", "0", "--", "true"), "'0' is not an integer of at least 1"),
    (("--processes", "2"), "nothing to run"),
    (("--processes", "2", "--config", "a"), "must be given together"),
    (("--processes", "2", "--nonsense", "--", "true"), "--nonsense"),
    (("--processes", "2", "--", "no-such-program"), "cannot be run"),
])
def test_a_bad_command_line_exits_with_code_2_and_one_sentence(arguments, reason):
    done = run(*arguments)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    assert reason in done.stderr


def test_help_prints_the_module_docstring():
    assert "--devices-per-process 4" in run("--help").stdout
