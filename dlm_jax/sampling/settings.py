"""How to fill a canvas, in the user's terms."""

import dataclasses

from dlm_jax.errors import UserError
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.sampling.cached_forward import CACHES, CachePolicy
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.unmasking import parse_unmasking

MAX_DEFAULT_STEPS = 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fill a canvas. Raises `UserError` for values outside their range."""

    unmasking: str = "confidence"  # which tokens each step commits, such as 'threshold:0.9': see `unmasking.py`
    # Denoising steps for the canvas, or per block if there are blocks. Default: one per token of the block, or of the
    # canvas with at most 64.
    steps: int | None = None
    temperature: float = 0.0  # this and the next three: see `Proposal`
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    block: int | None = None  # positions that a bidirectional model fills before it moves on. Default: the whole canvas
    # 'none', 'block', 'prefix' or 'dual': see `cached_forward.py`. Default: 'block' for block-causal models, where it
    # changes only the time, and 'none' for others.
    cache: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        parse_unmasking(self.unmasking)
        self.proposal()
        for name in ("steps", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if self.cache is not None and self.cache not in CACHES:
            raise UserError(f"'{self.cache}' is not a cache; choose one of {', '.join(CACHES)}")

    def proposal(self) -> Proposal:
        """What proposes a token for each position."""
        return Proposal(self.temperature, self.top_k, self.top_p, self.min_p)

    def block_size_for(self, spec: DiffusionSpec) -> int:
        """Positions per block, 0 for the whole canvas. Raises `UserError` if the model has blocks of its own."""
        if spec.rule == "bidirectional":
            return self.block or 0
        if self.block not in (None, spec.block_size):
            raise UserError(f"this model decodes blocks of {spec.block_size or 1}, not of {self.block}; omit block")
        return spec.block_size or 1

    def steps_for(self, masked: int, spec: DiffusionSpec) -> int:
        """Denoising steps, per block if there are blocks, for a request with this many masked positions."""
        return self.steps or spec.block_size or self.block or min(masked, MAX_DEFAULT_STEPS)

    def caching(self, spec: DiffusionSpec) -> CachePolicy:
        """The cache policy for a model. Raises `UserError` if the cache is for other models."""
        name = self.cache or ("none" if spec.rule == "bidirectional" else "block")
        rule = CACHES[name].rule
        if spec.is_diffusion and rule not in (None, spec.rule):
            raise UserError(f"the cache '{name}' is for {rule} models and this one is {spec.rule}; choose another "
                            "cache, or omit it")
        if rule == "bidirectional" and self.block is None:
            raise UserError(f"the cache '{name}' is refilled at the start of each block; set block to the number of "
                            "positions per block")
        return CACHES[name]
