"""The config of a training run: its keys (`fields`), how a config file is read (`load`), and what several share
(`shared`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax.config.fields import CheckpointConfig as CheckpointConfig
    from dlm_jax.config.fields import Config as Config
    from dlm_jax.config.fields import DataConfig as DataConfig
    from dlm_jax.config.fields import EvaluateConfig as EvaluateConfig
    from dlm_jax.config.fields import LogConfig as LogConfig
    from dlm_jax.config.fields import MeshConfig as MeshConfig
    from dlm_jax.config.fields import ModelSource as ModelSource
    from dlm_jax.config.fields import OptimizerConfig as OptimizerConfig
    from dlm_jax.config.fields import Remat as Remat
    from dlm_jax.config.fields import TrainConfig as TrainConfig
    from dlm_jax.config.load import build as build
    from dlm_jax.config.load import load_config as load_config
    from dlm_jax.config.load import to_json as to_json
    from dlm_jax.config.shared import base_config as base_config

_MODULES = {
    "shared": ["base_config"],
    "fields": ["CheckpointConfig", "Config", "DataConfig", "EvaluateConfig", "LogConfig", "MeshConfig", "ModelSource",
               "OptimizerConfig", "Remat", "TrainConfig"],
    "load": ["build", "load_config", "to_json"],
}
_HOME = {name: f"dlm_jax.config.{module}" for module, names in _MODULES.items() for name in names}
__all__ = ["CheckpointConfig", "Config", "DataConfig", "EvaluateConfig", "LogConfig", "MeshConfig", "ModelSource",
           "OptimizerConfig", "Remat", "TrainConfig", "base_config", "build", "load_config", "to_json"]


def __getattr__(name: str) -> Any:
    """The public names, imported when first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'dlm_jax.config' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
