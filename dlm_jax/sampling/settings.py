"""How to fill a canvas, as a user says it."""

import dataclasses

from dlm_jax.errors import UserError
from dlm_jax.models.card import Card
from dlm_jax.sampling.order import parse_order
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.reading import CACHES, Caching

MOST_STEPS = 64  # where nothing is said


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fill a canvas.

    order: which places are filled first, such as 'confidence' or 'threshold:0.9' (see `order.py`). steps: denoising
    steps of the canvas, or of each block; default: one a token, at most 64. temperature, top_k, top_p, min_p: see
    `Proposal`. block: how many places a bidirectional model fills before it goes on to the next ones; default: all at
    once. cache: 'none', 'block', 'prefix' or 'dual' (see `reading.py`); default: 'block' where the model is
    block-causal, which changes nothing but the time, and else 'none'.
    """

    order: str = "confidence"
    steps: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    block: int | None = None
    cache: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        parse_order(self.order)
        self.proposal()
        for name in ("steps", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.cache is not None and self.cache not in CACHES:
            raise UserError(f"'{self.cache}' is not a cache; choose one of {', '.join(CACHES)}")

    def proposal(self) -> Proposal:
        """The part that proposes tokens."""
        return Proposal(self.temperature, self.top_k, self.top_p, self.min_p)

    def size(self, card: Card) -> int:
        """Places of a block, 0 for the whole canvas. Raises `UserError` where the model has blocks of its own."""
        if card.rule == "bidirectional":
            return self.block or 0
        if self.block not in (None, card.block_size):
            raise UserError(f"this model decodes blocks of {card.block_size or 1} and not of {self.block}; leave block "
                            "out")
        return card.block_size or 1

    def steps_of(self, holes: int, card: Card) -> int:
        """Denoising steps for so many masked places."""
        return self.steps or card.block_size or self.block or min(holes, MOST_STEPS)

    def caching(self, card: Card) -> Caching:
        """The cache for a model. Raises `UserError` for one that is for other models."""
        name = self.cache or ("none" if card.rule == "bidirectional" else "block")
        rule = CACHES[name].rule
        if card.is_diffusion and rule not in (None, card.rule):
            raise UserError(f"the cache '{name}' is for {rule} models and this one is {card.rule}; choose another, or "
                            "leave it out")
        if rule == "bidirectional" and self.block is None:
            raise UserError(f"the cache '{name}' is made anew with each block; say how many places a block has")
        return CACHES[name]
