"""Masked diffusion: recipes, corruption, loss weights and cross-entropy. Pure mathematics; no model."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_jax.diffusion.noise import NoisyBatch as NoisyBatch
    from dlm_jax.diffusion.noise import add_noise as add_noise
    from dlm_jax.diffusion.recipe import Recipe as Recipe
    from dlm_jax.diffusion.recipe import recipe_at as recipe_at
    from dlm_jax.diffusion.recipes import RECIPES as RECIPES

__all__ = ["RECIPES", "NoisyBatch", "Recipe", "add_noise", "recipe_at"]

_HOME = {
    "NoisyBatch": "dlm_jax.diffusion.noise",
    "add_noise": "dlm_jax.diffusion.noise",
    "Recipe": "dlm_jax.diffusion.recipe",
    "recipe_at": "dlm_jax.diffusion.recipe",
    "RECIPES": "dlm_jax.diffusion.recipes",
}


def __getattr__(name: str) -> object:
    """The names of `__all__`, imported when first used."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
