"""Several devices and several processes as one run."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dlm_jax.parallel.mesh import make_mesh as make_mesh

__all__ = ["make_mesh"]

_HOME = {
    "make_mesh": "dlm_jax.parallel.mesh",
}


def __getattr__(name: str) -> object:
    """The names of `__all__`, imported when first used."""
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
