"""dlm-jax: convert autoregressive language models into diffusion language models.

    import dlm_jax
    lm = dlm_jax.load("path or hub id")
    print(lm.sample("Once upon a time"))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax.errors import UserError as UserError
    from dlm_jax.language_model import LanguageModel as LanguageModel
    from dlm_jax.language_model import load as load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "UserError", "load"]

_HOME = {"LanguageModel": "dlm_jax.language_model", "load": "dlm_jax.language_model", "UserError": "dlm_jax.errors"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'dlm_jax' has no attribute '{name}'")
    import importlib
    return getattr(importlib.import_module(_HOME[name]), name)
