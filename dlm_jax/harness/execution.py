"""Running programs that a model has written, confined: see `confined.py` for what is out of their reach."""

import contextlib
import os
import platform
import secrets
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from dlm_jax.errors import UserError
from dlm_jax.harness.confined import ALLOWED

SCRIPT = Path(__file__).with_name("confined.py")


def check_confinement() -> None:
    """Raises `UserError` where programs cannot be confined."""
    if sys.platform != "linux" or platform.machine() not in ALLOWED or not passes("assert 1 + 1 == 2"):
        raise UserError("programs are run only where the kernel can confine them (seccomp, on Linux, x86_64 or "
                        "aarch64), and this is no such machine; leave out the tasks that run programs")


def passes(program: str, seconds: int = 10, memory: int = 2**30) -> bool:
    """Whether the program comes to its end without an error, in `seconds` of CPU time, twice as much of real time, and
    `memory` bytes. It sees no environment, and a Python whose modules are those of `confined.PRELOADED`."""
    token = secrets.token_hex(16)
    with tempfile.TemporaryFile() as verdict:
        process = subprocess.Popen([sys.executable, "-I", "-S", "-B", str(SCRIPT), str(seconds), str(memory)], env={},
                                   stdin=subprocess.PIPE, stdout=verdict, stderr=subprocess.DEVNULL, cwd="/",
                                   start_new_session=True)
        try:
            process.communicate(f"{token}\n{program}".encode("utf-8", "surrogatepass"), timeout=2 * seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        verdict.seek(0)
        return process.returncode == 0 and verdict.read() == token.encode()
