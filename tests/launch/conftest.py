"""Stubs of `gcloud`, `xpk`, `srun` and other tools, first on PATH, that record how they were called."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"

# Every stubbed command is this program. `machines` is the state of the VM and `queue` that of its queued resource
# (None: it does not exist). Each `create` consumes the next entry of `creations`; each query for the status of the run
# consumes the next of `answers`, where PREEMPTED also preempts the machines.
STUB = '''#!{python} -IS
import json, os, sys
name, arguments = os.path.basename(sys.argv[0]), sys.argv[1:]
here = os.path.dirname(os.path.abspath(sys.argv[0]))
with open(os.path.join(here, "calls"), "a") as f:
    f.write(json.dumps([name, *arguments]) + "\\n")
path = os.path.join(here, "world.json")
world = json.load(open(path))

def leave(code, out="", err=""):
    json.dump(world, open(path, "w"))
    sys.stdout.write(out), sys.stderr.write(err)
    sys.exit(code)

if name == "git":
    if "archive" in arguments:
        open(arguments[arguments.index("-o") + 1], "w").close()
    leave("missing.py" in arguments[-1])
if name != "gcloud":
    world["environment"] = dict(os.environ)
    leave(world["code"])
kind, verb = ("queue" if arguments[2] == "queued-resources" else "machines"), arguments[3]
if world["offline"]:
    leave(1, err="ERROR: no credentials\\n")
if verb == "describe":
    if world[kind] is None:
        leave(1, err="ERROR: NOT_FOUND: the resource was not found\\n")
    leave(0, world[kind] + "\\n")
if verb == "create":
    state = world["creations"].pop(0) if world["creations"] else {{"queue": "ACTIVE", "machines": "READY"}}[kind]
    if state == "STOCKOUT":
        leave(1, err="ERROR: no capacity\\n")
    world[kind] = state
    world["machines"] = world["machines"] or "READY"
    leave(0)
if verb == "delete":
    world["queue"] = world["machines"] = None
    leave(0)
command = arguments[-1]
if verb == "ssh" and command.endswith("install"):
    leave(world["install"])
if verb == "ssh" and command.endswith("status"):
    answer = world["answers"].pop(0) if world["answers"] else "0"
    if answer == "PREEMPTED":
        world["machines"] = "PREEMPTED"
        leave(255)
    leave(0, answer + "\\n")
leave(0)
'''


class Result(NamedTuple):
    """The exit code of a script, its output, and the commands it ran."""

    code: int
    out: str
    err: str
    calls: list[list[str]]

    def verbs(self) -> list[str]:
        """The verbs that `gcloud compute tpus ...` was called with, in order."""
        return [call[4] for call in self.calls if call[0] == "gcloud"]

    def commands(self) -> list[str]:
        """The commands run on the workers."""
        return [call[-1].removeprefix("--command=") for call in self.calls if "ssh" in call]


class World:
    """A directory of stubs and the state they share."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.state = {"machines": None, "queue": None, "creations": [], "answers": [], "install": 0, "code": 0,
                      "offline": False, "environment": {}}
        for name in ("gcloud", "xpk", "srun", "sbatch", "dlm", "git"):
            stub = directory / name
            stub.write_text(STUB.format(python=sys.executable))
            stub.chmod(0o755)

    def run(self, script: str, *arguments: str, **environment: str) -> Result:
        """Runs a script of launch/ against the stubs."""
        calls, state = self.directory / "calls", self.directory / "world.json"
        calls.write_text("")
        state.write_text(json.dumps(self.state))
        path = f"{self.directory}:{os.environ['PATH']}"
        clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
        done = subprocess.run(["bash", str(LAUNCH / script), *arguments], capture_output=True, text=True, timeout=30,
                              env=clean | {"PATH": path, "LAUNCH_PAUSE": "0"} | environment)
        self.state = json.loads(state.read_text())
        return Result(done.returncode, done.stdout, done.stderr,
                      [json.loads(line) for line in calls.read_text().splitlines()])


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A world without machines in which every command succeeds."""
    directory = tmp_path / "bin"
    directory.mkdir()
    return World(directory)
