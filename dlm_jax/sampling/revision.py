"""Revisions: how a step may change tokens that were committed earlier, while their block is still being filled."""

from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from dlm_jax import struct
from dlm_jax.sampling.selector import View
from dlm_jax.typing import Mask, PerSequence, Tokens, shape_checked


class Revision(Protocol):
    """What every revision offers. It is a pytree, as a `Selector` is."""

    masks: ClassVar[bool]  # True: the positions it selects are masked again; False: they take the proposed token

    def __call__(self, tokens: Tokens, view: View) -> Mask:
        """The positions whose token it would change."""
        ...


@struct.dataclass
class Remask:
    """Re-masks tokens whose probability, in the current context, has dropped below a threshold. The sampler allows this
    once per position, so that it terminates."""

    min_probability: PerSequence  # in [0, 1]
    masks: ClassVar[bool] = True

    @shape_checked
    def __call__(self, tokens: Tokens, view: View) -> Mask:
        logits = jnp.take_along_axis(view.logits, tokens[..., None], -1)[..., 0]
        return jnp.exp(logits - jax.nn.logsumexp(view.logits, -1)) < self.min_probability


@struct.dataclass
class Edit:
    """Replaces a token by another one that the model now proposes with a confidence above a threshold (LLaDA 2.1)."""

    min_confidence: PerSequence  # in [0, 1]
    masks: ClassVar[bool] = False

    @shape_checked
    def __call__(self, tokens: Tokens, view: View) -> Mask:
        return (view.tokens != tokens) & (view.confidence > self.min_confidence)
