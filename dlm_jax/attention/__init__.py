"""Attention under mask rules, for CPU, TPU and GPU.

    from dlm_jax.attention import BlockDiffusion, attend
    out = attend(q, k, v, BlockDiffusion(length=1024, block=32), segments)

Vocabulary of this package, as every file uses it:

- rule: which keys a query sees, whatever the batch (`rules.py`).
- region: a contiguous part of the keys. One stream is one region; the two streams [noisy || clean] are two.
- interval: the run of keys [lo, hi) that one query sees in one region. It may be empty.
- visible, hidden: a (query, key) pair that the rule allows, or not.
- tile: TILE x TILE pairs of the (query, key) plane, the unit that a kernel computes or skips. A full tile hides
  nothing and needs no mask; a partial tile shows some pairs and hides others.
- plan: a rule applied to one batch: its intervals and its tiles (`plan.py`).
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
