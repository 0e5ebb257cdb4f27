"""Text in, batches out: `prepare` packs documents into a dataset on disk; `Dataset` and `Mixture` read batches."""

from typing import TYPE_CHECKING, Any

# Imported eagerly: importing the submodule `prepare` would otherwise rebind this name to the module.
from dlm_jax.data.prepare import prepare

if TYPE_CHECKING:
    from dlm_jax.data.dataset import Dataset as Dataset
    from dlm_jax.data.mixture import Mixture as Mixture
    from dlm_jax.data.text import read_documents as read_documents
    from dlm_jax.data.tokenizer import Tokenizer as Tokenizer

__all__ = ["Dataset", "Mixture", "Tokenizer", "prepare", "read_documents"]

_HOME = {"Dataset": "dlm_jax.data.dataset", "Mixture": "dlm_jax.data.mixture", "Tokenizer": "dlm_jax.data.tokenizer",
         "read_documents": "dlm_jax.data.text"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'dlm_jax.data' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
