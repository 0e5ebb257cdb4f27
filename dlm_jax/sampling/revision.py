"""Revisions: how a step may change tokens that were committed earlier, while their block is still being filled."""

import dataclasses
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError
from dlm_jax.sampling.selector import View
from dlm_jax.typing import Mask, Tokens, shape_checked


class Revision(Protocol):
    """What every revision offers. It is hashable, because jit takes it as a static argument."""

    masks: ClassVar[bool]  # True: the positions it selects are masked again; False: they take the proposed token

    def __hash__(self) -> int:
        ...

    def __call__(self, tokens: Tokens, view: View) -> Mask:
        """The positions whose token it would change."""
        ...


@dataclasses.dataclass(frozen=True)
class Remask:
    """Re-masks tokens whose probability, in the current context, has dropped below a threshold. The sampler allows this
    once per position, so that it terminates."""

    min_probability: float
    masks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_probability <= 1:
            raise UserError(f"remask needs a probability in [0, 1], not {self.min_probability}")

    @shape_checked
    def __call__(self, tokens: Tokens, view: View) -> Mask:
        logits = jnp.take_along_axis(view.logits, tokens[..., None], -1)[..., 0]
        return jnp.exp(logits - jax.nn.logsumexp(view.logits, -1)) < self.min_probability


@dataclasses.dataclass(frozen=True)
class Edit:
    """Replaces a token by another one that the model now proposes with a confidence above a threshold (LLaDA 2.1)."""

    min_confidence: float
    masks: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.min_confidence <= 1:
            raise UserError(f"edit needs a probability in [0, 1], not {self.min_confidence}")

    @shape_checked
    def __call__(self, tokens: Tokens, view: View) -> Mask:
        return (view.tokens != tokens) & (view.confidence > self.min_confidence)
