"""Checkpoints in and out: Hugging Face directories, dlm-jax's native directories, and PEFT adapters."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax.convert.hf_export import write_hf as write_hf
    from dlm_jax.convert.hf_import import read_hf as read_hf
    from dlm_jax.convert.native import read_native as read_native
    from dlm_jax.convert.native import write_native as write_native
    from dlm_jax.convert.peft import read_peft as read_peft
    from dlm_jax.convert.peft import write_peft as write_peft

__all__ = ["read_hf", "read_native", "read_peft", "write_hf", "write_native", "write_peft"]

_HOME = {"read_hf": "dlm_jax.convert.hf_import", "write_hf": "dlm_jax.convert.hf_export",
         "read_native": "dlm_jax.convert.native", "write_native": "dlm_jax.convert.native",
         "read_peft": "dlm_jax.convert.peft", "write_peft": "dlm_jax.convert.peft"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'dlm_jax.convert' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
