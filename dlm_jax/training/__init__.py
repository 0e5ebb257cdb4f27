"""Training: `train` sets a run up (`run`), the loop steps through it (`loop`), and one step is pure (`step`)."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax.training.run import Outcome as Outcome
    from dlm_jax.training.run import train as train
    from dlm_jax.training.step import TrainState as TrainState
    from dlm_jax.training.step import init_state as init_state
    from dlm_jax.training.step import make_step as make_step

__all__ = ["Outcome", "TrainState", "init_state", "make_step", "train"]

_HOME = {"Outcome": "dlm_jax.training.run", "train": "dlm_jax.training.run", "TrainState": "dlm_jax.training.step",
         "init_state": "dlm_jax.training.step", "make_step": "dlm_jax.training.step"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'dlm_jax.training' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
