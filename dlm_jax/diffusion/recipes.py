"""Recipes: named settings of streams, alignment, rule, corruption and annealing."""

import dataclasses
from typing import Literal

from dlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    streams: 1, the model reads the corrupted text; 2, it reads [noisy || clean]; a recipe without corruption is plain
    autoregressive training.
    block_size: with two streams, the tokens that are denoised together; 0 with one.
    half_life: lambda of position-dependent masking; 0 with the other corruptions.
    anneal_steps: steps over which a causal mask opens to the full one; 0 starts with the full mask.
    t_min: levels are drawn from (t_min, 1]; the weight of the loss is 1/t.
    """

    name: str
    streams: Literal[1, 2]
    alignment: Literal["shifted", "same_position"]
    corruption: Literal["none", "uniform", "position_dependent"] = "uniform"
    block_size: int = 0
    half_life: float = 0.0
    anneal_steps: int = 0
    t_min: float = 1e-3

    def __post_init__(self) -> None:
        for problem, found in self._contradictions().items():
            if found:
                raise UserError(f"recipe '{self.name}': {problem}")

    def _contradictions(self) -> dict[str, bool]:
        return {
            f"streams must be 1 or 2, not {self.streams}": self.streams not in (1, 2),
            f"alignment must be 'shifted' or 'same_position', not '{self.alignment}'":
                self.alignment not in ("shifted", "same_position"),
            f"corruption must be 'none', 'uniform' or 'position_dependent', not '{self.corruption}'":
                self.corruption not in ("none", "uniform", "position_dependent"),
            f"two streams need a block_size of at least 1, not {self.block_size}":
                self.streams == 2 and self.block_size < 1,
            f"block_size {self.block_size} needs two streams; set streams to 2 or block_size to 0":
                self.streams == 1 and self.block_size != 0,
            "anneal_steps opens the causal mask of one stream; with two streams it must be 0":
                self.streams == 2 and self.anneal_steps != 0,
            f"anneal_steps must not be negative, not {self.anneal_steps}": self.anneal_steps < 0,
            "half_life goes with position_dependent corruption in two streams, and only with it":
                (self.corruption == "position_dependent") != (self.half_life > 0)
                or (self.corruption == "position_dependent" and self.streams != 2),
            "without corruption there is one stream, shifted, and nothing to anneal":
                self.corruption == "none"
                and (self.streams, self.alignment, self.anneal_steps) != (1, "shifted", 0),
            f"t_min must lie in (0, 1), not {self.t_min}": not 0 < self.t_min < 1,
        }

    @property
    def rule(self) -> Literal["causal", "bidirectional", "block_causal"]:
        """The rule under which the trained model denoises (a `Card.rule`)."""
        if self.corruption == "none":
            return "causal"
        return "block_causal" if self.streams == 2 else "bidirectional"


RECIPES = {
    recipe.name: recipe
    for recipe in (
        # Plain next-token training: makes the autoregressive base.
        Recipe("ar", streams=1, alignment="shifted", corruption="none"),
        # arXiv 2410.17891 with its GPT-2 annealing of 10,000 steps; first tokens are protected, and the loss is divided
        # by all tokens (the NELBO) where the authors' code divides by the masked ones.
        Recipe("diffullama", streams=1, alignment="shifted", anneal_steps=10_000),
        # arXiv 2512.14067 at 1.5B: block 16, lambda 0.1.
        Recipe("efficient_dlm", streams=2, alignment="same_position", corruption="position_dependent", block_size=16,
               half_life=0.1),
        # arXiv 2503.09573, linear schedule.
        Recipe("bd3lm", streams=2, alignment="same_position", block_size=16),
        # arXiv 2406.07524: one stream, no shift, full visibility from the start.
        Recipe("mdlm", streams=1, alignment="same_position"),
    )
}


def recipe(name: str) -> Recipe:
    """The recipe of that name, or `UserError` with the names there are."""
    if name not in RECIPES:
        raise UserError(f"there is no recipe '{name}'; the recipes are {', '.join(RECIPES)}")
    return RECIPES[name]
