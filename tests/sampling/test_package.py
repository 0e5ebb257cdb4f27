"""The names that `dlm_jax.sampling` exports."""

import importlib
import subprocess
import sys
import types

import pytest

from dlm_jax import sampling


@pytest.mark.parametrize("name", sampling.__all__)
def test_every_exported_name_is_an_object_of_a_module_and_never_the_module(name):
    importlib.import_module("dlm_jax.language_model")  # imports the modules, which become attributes of the package
    found = getattr(sampling, name)
    assert found.__name__ == name and not isinstance(found, types.ModuleType)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="No dlm_jax.sampling attribute sampler"):
        _ = sampling.sampler


def test_importing_the_package_does_not_import_jax():
    script = "import sys, dlm_jax.sampling, dlm_jax.evaluation; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
