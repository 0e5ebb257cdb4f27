"""The training loss of a recipe, as sums over a batch."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_jax.objective.loss import LossSums as LossSums
    from dlm_jax.objective.loss import loss_sums as loss_sums

__all__ = ["LossSums", "loss_sums"]

_HOME = {
    "LossSums": "dlm_jax.objective.loss",
    "loss_sums": "dlm_jax.objective.loss",
}


def __getattr__(name: str) -> object:
    """The names of `__all__`, imported when first used."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
