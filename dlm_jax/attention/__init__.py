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

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlm_jax.attention.dispatch import attend as attend
    from dlm_jax.attention.plan import Plan as Plan
    from dlm_jax.attention.plan import dense_mask as dense_mask
    from dlm_jax.attention.plan import make_plan as make_plan
    from dlm_jax.attention.plan import visible_pairs as visible_pairs
    from dlm_jax.attention.rules import Annealed as Annealed
    from dlm_jax.attention.rules import Bidirectional as Bidirectional
    from dlm_jax.attention.rules import BlockCausal as BlockCausal
    from dlm_jax.attention.rules import BlockDiffusion as BlockDiffusion
    from dlm_jax.attention.rules import Causal as Causal
    from dlm_jax.attention.rules import CausalThenBlocks as CausalThenBlocks
    from dlm_jax.attention.rules import CausalThenLastBlock as CausalThenLastBlock
    from dlm_jax.attention.rules import LookAhead as LookAhead
    from dlm_jax.attention.rules import Rule as Rule
    from dlm_jax.attention.visibility import denoising_rule as denoising_rule
    from dlm_jax.attention.visibility import training_rule as training_rule

_EXPORTS = {
    "dispatch": ("attend",),
    "plan": ("Plan", "dense_mask", "make_plan", "visible_pairs"),
    "rules": ("Annealed", "Bidirectional", "BlockCausal", "BlockDiffusion", "Causal", "CausalThenBlocks",
              "CausalThenLastBlock", "LookAhead", "Rule"),
    "visibility": ("denoising_rule", "training_rule"),
}
_HOME = {name: f"dlm_jax.attention.{module}" for module, names in _EXPORTS.items() for name in names}

__all__ = ["Annealed", "Bidirectional", "BlockCausal", "BlockDiffusion", "Causal", "CausalThenBlocks",
           "CausalThenLastBlock", "LookAhead", "Plan", "Rule", "attend", "denoising_rule", "dense_mask", "make_plan",
           "training_rule", "visible_pairs"]


def __getattr__(name: str) -> Any:
    """The public names, imported on first use."""
    if name not in _HOME:
        raise AttributeError(f"module 'dlm_jax.attention' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
