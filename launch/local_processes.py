"""Runs `dlm train`, or any command, as one distributed program of local processes, each with fake CPU devices.

    python launch/local_processes.py --processes 2 --devices-per-process 4 --config FILE --workdir DIR
        [--grace SECONDS] [--dry-run] [-- --config.train.steps=10 ...]
    python launch/local_processes.py --processes 2 -- python my_program.py

Use it to try out or test at home what will run on a pod. Each process gets the environment variables DLM_COORDINATOR
(127.0.0.1 and a free port), DLM_PROCESSES (how many there are) and DLM_PROCESS (its index). Every line of output is
prefixed with the index of its process. When a process fails, the others get SIGTERM and, after --grace seconds
(default: 10), SIGKILL; the exit code is that of the process that failed first. SIGINT and SIGTERM are forwarded to all
processes.
"""

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """Reports an error in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"local_processes.py: {message}; --help lists the arguments\n")


def positive(text: str) -> int:
    """Parses an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not an integer of at least 1")
    return int(text)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The parsed flags, and the command that each process runs."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS,
                    allow_abbrev=False)
    parser.add_argument("--processes", type=positive, required=True)
    parser.add_argument("--devices-per-process", type=positive, default=1)
    parser.add_argument("--grace", type=float, default=10.0)
    parser.add_argument("--config")
    parser.add_argument("--workdir")
    parser.add_argument("--dry-run", action="store_true")
    a = parser.parse_args(argv[:split])
    rest = argv[split + 1:]
    if (a.config is None) != (a.workdir is None):
        parser.error("--config and --workdir must be given together")
    if a.config is None and not rest:
        parser.error("nothing to run: give --config and --workdir, or a command after --")
    train = [sys.executable, "-m", "dlm_jax", "train", "--config", a.config, "--workdir", a.workdir]
    return a, rest if a.config is None else train + rest


def free_port() -> int:
    """A loopback port that is currently free."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def variables(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """The environment variables of a process, on top of those of this script."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {"DLM_COORDINATOR": f"127.0.0.1:{port}", "DLM_PROCESSES": str(processes), "DLM_PROCESS": str(process),
            "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def show(process: int, output) -> None:
    """Copies lines to stdout, each in one write and prefixed with the index of its process."""
    for line in output:
        sys.stdout.buffer.write(b"[%d] %s\n" % (process, line.rstrip(b"\n")))
        sys.stdout.buffer.flush()


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """A process in its own process group: signals also reach its children, and Ctrl-C reaches it only through us."""
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL, start_new_session=True)


def send(running: list[subprocess.Popen], number: int) -> None:
    """Sends a signal to the process groups of the children that are still running."""
    for child in running:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has exited in the meantime
                os.killpg(child.pid, number)


def wait(running: list[subprocess.Popen], grace: float) -> int:
    """Waits for all children and terminates the rest once one fails.

    Returns the exit code of the first to fail, or 0; a signal n counts as 128 + n, as in a shell.
    """
    code, kill_at = 0, float("inf")
    while None in (codes := [child.poll() for child in running]):
        failed = [c for c in codes if c]
        if failed and not code:
            code, kill_at = failed[0], time.monotonic() + grace
            send(running, signal.SIGTERM)
        if time.monotonic() > kill_at:
            send(running, signal.SIGKILL)
        time.sleep(0.05)
    code = code or next((c for c in codes if c), 0)
    return code if code >= 0 else 128 - code


def main() -> int:
    a, command = parse(sys.argv[1:])
    port = free_port()
    environments = [variables(i, a.processes, a.devices_per_process, port) for i in range(a.processes)]
    if a.dry_run:
        for environment in environments:
            print(shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command]))
        return 0
    running: list[subprocess.Popen] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: send(running, received))
    try:
        for environment in environments:
            running.append(start(command, environment))
        readers = [threading.Thread(target=show, args=(i, child.stdout), daemon=True)
                   for i, child in enumerate(running)]
        for reader in readers:
            reader.start()
        code = wait(running, a.grace)
        for reader in readers:
            reader.join(timeout=2)  # a grandchild may keep the pipe open; do not wait for it
        return code
    except OSError as error:
        reason = f"{command[0]} cannot be run: {error.strerror}; fix the command after --"
        print(f"local_processes.py: {reason}", file=sys.stderr)
        return 2
    finally:
        send(running, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
