"""The package exports its public names, and importing it stays cheap."""

import importlib
import subprocess
import sys

import pytest

import dlm_jax.convert
import dlm_jax.data


@pytest.mark.parametrize("package", [dlm_jax.data, dlm_jax.convert])
def test_every_public_name_is_importable_and_unknown_ones_are_not(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="attribute nonsense"):
        _ = package.nonsense


def test_prepare_is_the_function_even_after_its_module_was_imported():
    module = importlib.import_module("dlm_jax.data.prepare")
    assert dlm_jax.data.prepare is module.prepare


def test_importing_the_package_loads_neither_jax_nor_transformers():
    code = "import sys, dlm_jax.data; assert not {'jax', 'grain', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
