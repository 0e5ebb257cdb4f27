"""How to fill a canvas, in the user's terms."""

import dataclasses

from dlm_jax.errors import UserError
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.sampling.cached_forward import CACHES, CachePolicy
from dlm_jax.sampling.proposal import Proposal, check_proposal
from dlm_jax.sampling.unmasking import Jacobi, parse_unmasking

MAX_CFG_SCALE = 100.0


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to fill a canvas. Raises `UserError` for values outside their range."""

    unmasking: str = "confidence"  # which tokens each step commits, such as 'threshold:0.9': see `unmasking.py`
    # Denoising steps for the whole text; blocks share them by the tokens that each has to fill. Default: one per token.
    steps: int | None = None
    temperature: float = 0.0  # this and the next three: see `Proposal`
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    # Positions that a bidirectional model fills before it moves on, counted from the first hole. Default: all of them.
    block: int | None = None
    # 'none', 'block', 'prefix' or 'dual': see `cached_forward.py`. Default: 'block' for block-causal models, where it
    # changes only the time, and 'none' for others.
    cache: str | None = None
    cfg_scale: float = 0.0  # classifier-free guidance: how far to move away from what the model says without a prompt
    suppress_tokens: tuple[int, ...] = ()  # ids that are never written
    seed: int = 0

    def __post_init__(self) -> None:
        parse_unmasking(self.unmasking)
        self.proposal()
        for name in ("steps", "block"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        if not 0 <= self.cfg_scale <= MAX_CFG_SCALE:
            raise UserError(f"cfg_scale must lie in [0, {MAX_CFG_SCALE}], not {self.cfg_scale}")
        if self.cfg_scale and self.cache not in (None, "none"):
            raise UserError("guidance runs every step on the whole text, with and without its prompt; leave out cache "
                            "or cfg_scale")
        if self.cache is not None and self.cache not in CACHES:
            raise UserError(f"'{self.cache}' is not a cache; choose one of {', '.join(CACHES)}")

    def proposal(self) -> Proposal:
        """What proposes a token for each position."""
        check_proposal(self.temperature, self.top_k, self.top_p, self.min_p)
        return Proposal(float(self.temperature), int(self.top_k), float(self.top_p), float(self.min_p))

    def block_size_for(self, spec: DiffusionSpec) -> int:
        """Positions per block, 0 for the whole canvas. Raises `UserError` if the model has blocks of its own."""
        if spec.rule == "bidirectional":
            return self.block or 0
        if self.block not in (None, spec.block_size):
            raise UserError(f"this model decodes blocks of {spec.block_size or 1}, not of {self.block}; omit block")
        selector = parse_unmasking(self.unmasking).selector
        return selector.window if isinstance(selector, Jacobi) else spec.block_size or 1

    def caching(self, spec: DiffusionSpec) -> CachePolicy:
        """The cache policy for a model. Raises `UserError` if the cache is for other models."""
        name = self.cache or ("none" if spec.rule == "bidirectional" or self.cfg_scale else "block")
        rule = CACHES[name].rule
        if spec.is_diffusion and rule not in (None, spec.rule):
            raise UserError(f"the cache '{name}' is for {rule} models and this one is {spec.rule}; choose another "
                            "cache, or omit it")
        if rule == "bidirectional" and self.block is None:
            raise UserError(f"the cache '{name}' is refilled at the start of each block; set block to the number of "
                            "positions per block")
        return CACHES[name]
