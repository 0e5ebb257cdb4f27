"""The config of a training run: its keys (`fields`), how a config file is read (`load`), and what several share
(`shared`)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
