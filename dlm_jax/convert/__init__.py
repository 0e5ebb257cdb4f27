"""Checkpoints in and out: Hugging Face directories, dlm-jax's native directories, and PEFT adapters."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
