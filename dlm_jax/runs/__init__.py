"""Work directories of training runs, local or in an object store: who owns them, and how their model is read."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax.runs.read import read_work_directory as read_work_directory
    from dlm_jax.runs.workdir import checkpoint_steps as checkpoint_steps

__all__ = ["checkpoint_steps", "read_work_directory"]

_HOME = {"checkpoint_steps": "dlm_jax.runs.workdir", "read_work_directory": "dlm_jax.runs.read"}


def __getattr__(name: str) -> Any:
    """The public names, imported when first used."""
    if name not in _HOME:
        raise AttributeError(f"module 'dlm_jax.runs' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
