"""Runs `dlm train`, or any command, in several processes on this machine that work as one, each with fake CPU devices.

    python launch/local_processes.py --processes 2 --devices-per-process 4 --config FILE --workdir DIR
        [--grace SECONDS] [--dry-run] [-- --config.train.steps=10 ...]
    python launch/local_processes.py --processes 2 -- python my_program.py

For trying at home, and for testing, what runs on a pod. Each process finds in its environment DLM_COORDINATOR
(127.0.0.1 and a free port), DLM_PROCESSES (how many) and DLM_PROCESS (which). Output comes line by line behind the
number of its process. The first process that fails ends the others (SIGTERM, and after --grace seconds, 10, SIGKILL)
and its exit code is the exit code here. SIGINT and SIGTERM are handed on to all.
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
    """Refuses in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"local_processes.py: {message}; --help shows what there is\n")


def positive(text: str) -> int:
    """A number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number from 1")
    return int(text)


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags, and the command that each process runs."""
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
        parser.error("--config and --workdir belong together")
    if a.config is None and not rest:
        parser.error("there is nothing to run: give --config and --workdir, or a command behind --")
    train = [sys.executable, "-m", "dlm_jax.cli", "train", "--config", a.config, "--workdir", a.workdir]
    return a, rest if a.config is None else train + rest


def free_port() -> int:
    """A port of loopback that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def variables(process: int, processes: int, devices: int, port: int) -> dict[str, str]:
    """What the environment of a process has beyond this one's."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {"DLM_COORDINATOR": f"127.0.0.1:{port}", "DLM_PROCESSES": str(processes), "DLM_PROCESS": str(process),
            "XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"}


def show(process: int, output) -> None:
    """Passes lines on, each behind the number of its process and in one piece."""
    for line in output:
        sys.stdout.buffer.write(b"[%d] %s\n" % (process, line.rstrip(b"\n")))
        sys.stdout.buffer.flush()


def start(command: list[str], environment: dict[str, str]) -> subprocess.Popen:
    """A process in a group of its own: a signal also reaches what it has started, and Ctrl-C only comes through us."""
    return subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            stdin=subprocess.DEVNULL, start_new_session=True)


def send(running: list[subprocess.Popen], number: int) -> None:
    """Sends a signal to the groups of those that have not ended."""
    for child in running:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended since
                os.killpg(child.pid, number)


def wait(running: list[subprocess.Popen], grace: float) -> int:
    """Waits for all. When one has failed, ends the others; returns the exit code of that one, as a shell counts."""
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
            reader.join(timeout=2)  # what a grandchild holds open is not waited for
        return code
    except OSError as error:
        reason = f"{command[0]} cannot be run: {error.strerror}; mend the command behind --"
        print(f"local_processes.py: {reason}", file=sys.stderr)
        return 2
    finally:
        send(running, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main())
