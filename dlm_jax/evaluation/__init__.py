"""Likelihood of texts under a model."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_jax.evaluation.log_likelihood import Likelihood as Likelihood
    from dlm_jax.evaluation.log_likelihood import denoising_recipe as denoising_recipe
    from dlm_jax.evaluation.log_likelihood import likelihood as likelihood

__all__ = ["Likelihood", "denoising_recipe", "likelihood"]


def __getattr__(name: str) -> object:
    """The public names, imported when first used."""
    if name not in __all__:
        raise AttributeError(f"module 'dlm_jax.evaluation' has no attribute '{name}'")
    return getattr(importlib.import_module("dlm_jax.evaluation.log_likelihood"), name)
