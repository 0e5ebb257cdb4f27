"""Work directories of training runs, local or in an object store: who owns them, and how their model is read."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
