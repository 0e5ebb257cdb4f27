"""Programs are confined: what they must not do makes them fail, and nothing of it happens."""

import os
import sys
import time

import pytest

from dlm_jax.harness import confined
from dlm_jax.harness.execution import check_confinement, passes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="confinement needs seccomp, which is Linux's")

RIGHT = {
    "arithmetic": "assert sum(range(10)) == 45",
    "modules": "import math, re, collections, hashlib\nassert math.gcd(12, 18) == 6 and re.sub('a', 'b', 'a') == 'b'\n"
               "assert collections.Counter('aab')['a'] == 2 and hashlib.md5(b'').hexdigest()[:2] == 'd4'",
    "an error that is caught": "try:\n    1 / 0\nexcept ZeroDivisionError:\n    pass",
    "much output": "print('x' * 10**7)",
    "much memory": "assert len(bytearray(10**8)) == 10**8",
}
WRONG = {
    "a failed assertion": "assert 1 == 2",
    "no program": "def (",
    "an endless loop": "while True: pass",
    "a long sleep": "import time\ntime.sleep(60)",
    "a fork": "import os\nos.fork()",
    "a process": "import subprocess\nsubprocess.run(['true'])",
    "a thread": "import threading\nthread = threading.Thread(target=print)\nthread.start()",
    "10 GiB": "x = bytearray(10 * 2**30)",
    "a file elsewhere": "open('{place}/written', 'w').write('x')",
    "a file here": "open('written', 'w').write('x')",
    "a file that is read": "open('/etc/hostname').read()",
    "the environment": "import os\nos.environ['SECRET_OF_THE_TESTS']",
    "the environment of the caller": "import os\nopen(f'/proc/{{os.getppid()}}/environ').read()",
    "a socket": "import socket\nsocket.socket()",
    "a connection": "import socket\nsocket.create_connection(('127.0.0.1', 1))",
    "a signal": "import os\nos.kill(os.getppid(), 9)",
    "an early end": "import sys\nsys.exit(0)",
    "an early end of the process": "import os\nos._exit(0)",
    "another program": "import os\nos.execv('/bin/true', ['true'])",
    "a removed file": "import os\nos.unlink('{place}/kept')",
    "a module that was not loaded": "import sqlite3",
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_program_that_only_computes_passes(name):
    assert passes(RIGHT[name])


@pytest.mark.parametrize("name", WRONG)
def test_a_program_that_errs_or_reaches_out_fails_and_leaves_no_trace(name, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_OF_THE_TESTS", "1")
    (tmp_path / "kept").touch()
    began = time.monotonic()
    assert not passes(WRONG[name].format(place=tmp_path), seconds=2)
    assert time.monotonic() - began < 30
    assert os.listdir(tmp_path) == ["kept"] and not os.path.exists("/written")


def test_a_machine_that_confines_passes_its_own_check():
    check_confinement()


def test_every_allowed_call_has_a_number_on_every_machine():
    assert len({len(numbers) for _, numbers in confined.ALLOWED.values()}) == 1
