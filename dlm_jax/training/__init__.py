"""Training: `train` sets a run up (`run`), the loop steps through it (`loop`), and one step is pure (`step`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
