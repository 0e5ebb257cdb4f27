"""dlm-jax: convert autoregressive language models into diffusion language models.

    import dlm_jax
    lm = dlm_jax.load("path or hub id")
    print(lm.sample("Once upon a time"))
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
