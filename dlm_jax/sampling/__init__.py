"""Sampling from a diffusion language model: `generate` turns requests into samples by `Settings`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_jax.sampling.generation import generate as generate
    from dlm_jax.sampling.requests import Request as Request
    from dlm_jax.sampling.sample import BatchCost as BatchCost
    from dlm_jax.sampling.sample import Sample as Sample
    from dlm_jax.sampling.settings import Settings as Settings
    from dlm_jax.sampling.unmasking import parse_unmasking as parse_unmasking

__all__ = ["BatchCost", "Request", "Sample", "Settings", "generate", "parse_unmasking"]

_MODULES = {"BatchCost": "sample", "Request": "requests", "Sample": "sample", "Settings": "settings",
            "generate": "generation", "parse_unmasking": "unmasking"}


def __getattr__(name: str) -> object:
    """The public names, imported when first used."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dlm_jax.sampling' has no attribute '{name}'")
    return getattr(importlib.import_module(f"dlm_jax.sampling.{_MODULES[name]}"), name)
