"""Text in, batches out: `prepare` packs documents into a dataset on disk; `Dataset` and `Mixture` read batches."""

import lazy_loader

# Imported eagerly: importing the submodule `prepare` would otherwise rebind this name to the module.
from dlm_jax.data.prepare import prepare as prepare

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
