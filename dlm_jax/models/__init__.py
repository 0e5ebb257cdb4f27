"""The transformer, its parameters, and what describes a checkpoint."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_jax.models.bundle import Bundle as Bundle
    from dlm_jax.models.config import ModelConfig as ModelConfig
    from dlm_jax.models.diffusion_spec import DiffusionSpec as DiffusionSpec
    from dlm_jax.models.lora import Lora as Lora
    from dlm_jax.models.transformer import forward as forward
    from dlm_jax.models.transformer import unembed as unembed
    from dlm_jax.models.weights import init as init
    from dlm_jax.models.weights import parameter_count as parameter_count

__all__ = ["Bundle", "DiffusionSpec", "Lora", "ModelConfig", "forward", "init", "parameter_count", "unembed"]

_HOME = {
    "Bundle": "dlm_jax.models.bundle",
    "ModelConfig": "dlm_jax.models.config",
    "DiffusionSpec": "dlm_jax.models.diffusion_spec",
    "Lora": "dlm_jax.models.lora",
    "forward": "dlm_jax.models.transformer",
    "unembed": "dlm_jax.models.transformer",
    "init": "dlm_jax.models.weights",
    "parameter_count": "dlm_jax.models.weights",
}


def __getattr__(name: str) -> object:
    """The names of `__all__`, imported when first used."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
