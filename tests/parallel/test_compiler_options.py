"""The table of compiler options: compilers accept them, the environment decides, and the step is compiled with them."""

import importlib.util
from types import SimpleNamespace
from unittest import mock

import jax
import pytest
from jax.sharding import use_abstract_mesh

from dlm_jax.aot.report import aot
from dlm_jax.aot.topology import devices, platform_of
from dlm_jax.config import load_config
from dlm_jax.parallel import compiler_options as options
from dlm_jax.parallel.compiler_options import TPU, compiler_options

TOPOLOGIES = {"TPU v4": "v4:2x2x1", "TPU v5 lite": "v5e:2x2", "TPU v5": "v5p:2x2x1", "TPU v6 lite": "v6e:2x2",
              "TPU7x": "tpu7x:2x2x1"}
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="needs libtpu: pip install 'dlm-jax[tpu]'")


def for_kind(kind: str) -> dict:
    with mock.patch("jax.devices", return_value=[SimpleNamespace(device_kind=kind)]):
        return compiler_options()


def compiles(topology: str, chosen: dict) -> None:
    """Compiles a tiny program with these options."""
    mesh = jax.sharding.Mesh(devices(topology)[:1], ("chip",))
    x = jax.ShapeDtypeStruct((128, 128), "float32", sharding=jax.sharding.NamedSharding(mesh, jax.P()))
    with use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(lambda x: x @ x).trace(x).lower(lowering_platforms=(platform_of(mesh.devices[0]),))
    lowered.compile(compiler_options=chosen)


@needs_libtpu
@pytest.mark.parametrize("kind", TPU)
def test_the_tpu_compiler_accepts_every_option(kind):
    assert devices(TOPOLOGIES[kind])[0].device_kind == kind
    compiles(TOPOLOGIES[kind], TPU[kind])


@needs_libtpu
def test_the_tpu_compiler_refuses_an_unknown_option():
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        compiles("v5e:2x2", {"xla_tpu_no_such_option": True})


@needs_libtpu
def test_the_training_step_is_compiled_with_the_options_of_its_device(tiny_run, monkeypatch):
    monkeypatch.setitem(options.TPU, "TPU v5 lite", {"xla_tpu_no_such_option": True})
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_tpu_no_such_option'"):
        aot(load_config("tiny", [*tiny_run, "train.grad_accum_steps=1"]), "v5e:2x2")


def test_a_cpu_has_none_and_an_unknown_tpu_none():
    assert compiler_options() == {} and for_kind("cpu") == {} and for_kind("TPU v99") == {}


@pytest.mark.parametrize("kind, variable", [("TPU v6 lite", "LIBTPU_INIT_ARGS"), ("NVIDIA H200", "XLA_FLAGS")])
def test_what_the_environment_sets_is_left_to_it(kind, variable, monkeypatch):
    name, *others = for_kind(kind)
    monkeypatch.setenv(variable, f"--xla_mine=3 --{name}=false")
    assert [*for_kind(kind)] == others
