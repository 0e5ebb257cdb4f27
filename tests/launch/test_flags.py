"""launch/flags.sh: its table of flags, and that the TPU compiler accepts them."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

FLAGS = Path(__file__).parents[2] / "launch" / "flags.sh"
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
COMPILE = """
import sys, jax
from dlm_jax.aot.topology import compile_for_chip
compile_for_chip(sys.argv[1], lambda x: x @ x, jax.ShapeDtypeStruct((128, 128), "float32"))
"""


def flags(generation: str) -> subprocess.CompletedProcess:
    command = ["bash", "-c", '. "$0"; flags_for "$1"', str(FLAGS), generation]
    return subprocess.run(command, capture_output=True, text=True)


def compiles(topology: str, arguments: str) -> subprocess.CompletedProcess:
    """Runs a tiny program through the TPU compiler, which aborts the process on an unknown flag."""
    environment = os.environ | {"LIBTPU_INIT_ARGS": arguments, "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, "-c", COMPILE, topology], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("generation", [*TOPOLOGIES, "gpu"])
def test_no_flag_is_listed_twice(generation):
    names = [flag.split("=")[0] for flag in flags(generation).stdout.split()]
    assert names and len(names) == len(set(names)) and all(name.startswith("--xla_") for name in names)


def test_an_unknown_generation_is_an_error():
    done = flags("v1")
    assert done.returncode == 2 and "no flags for 'v1'" in done.stderr


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'dlm-jax[tpu]'")
class TestLibtpu:
    """The compiler of the installed libtpu."""

    @pytest.mark.parametrize("generation", [
        name if name == "v5e" else pytest.param(name, marks=pytest.mark.slow) for name in TOPOLOGIES])
    def test_accepts_every_flag_of_the_table(self, generation):
        done = compiles(TOPOLOGIES[generation], flags(generation).stdout.strip())
        assert done.returncode == 0, done.stderr[-2000:]

    def test_aborts_on_an_unknown_flag(self):
        assert compiles("v5e:2x2", "--xla_tpu_no_such_flag=true").returncode != 0


def test_xla_accepts_the_gpu_flags():
    environment = os.environ | {"XLA_FLAGS": flags("gpu").stdout.strip(), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=environment, check=True)
