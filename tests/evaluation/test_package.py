"""The names that `dlm_jax.evaluation` exports."""

import importlib
import types

import pytest

from dlm_jax import evaluation


@pytest.mark.parametrize("name", evaluation.__all__)
def test_every_exported_name_is_an_object_of_a_module_and_never_the_module(name):
    importlib.import_module("dlm_jax.language_model")  # imports the modules, which become attributes of the package
    found = getattr(evaluation, name)
    assert found.__name__ == name and not isinstance(found, types.ModuleType)
