"""What a recipe is: a setting of streams, alignment, corruption, weights, losses and schedules that fits together."""

import dataclasses
import typing
from typing import Literal

from dlm_jax.diffusion.schedule import block_at, block_phases
from dlm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained.

    streams: 1, the model reads the corrupted text; 2, it reads [noisy || clean]; a recipe without corruption is plain
    autoregressive training.
    alignment: 'shifted', the output at n-1 predicts token n; 'same_position', the output at n predicts token n.
    block_size: with two streams, the tokens that are denoised together. With one, 0 for the whole text; otherwise a
    token sees its own block and earlier ones, which are noisy too (Efficient-DLM's ablation).
    clean_half: of two streams, what a clean token sees: clean tokens up to the end of its block, or to itself.

    corruption: 'uniform' masks each token by itself, 'exact_count' round(t m) of the m of a block,
    'position_dependent' as many, the later ones more often; half_life is its lambda, 0 with the others.
    t_min, t_max: levels are drawn from (t_min, t_max], one a block or one a sequence (levels).
    at_least_one: no block is without a mask. complementary: each record is seen twice, the second time with those
    tokens masked that were not.

    weight: of a masked token. 'inverse_level' 1/t; 'inverse_count' m/k with the k masked of its block's m; 'none' 1;
    'cart' the closeness of unmasked tokens.
    normaliser: what the sum of weighted losses is divided by, always of the whole batch: 'tokens', those that can be
    masked, so that 1/t gives the NELBO; 'masked' (DiffuLLaMA's code); 'masked_each', the masked of each record, as that
    code does in micro-batches of one.
    ar_weight: of the next-token loss on a token-causal clean half; kl_weight: of the divergence there from the frozen
    base. Both are means over tokens, and added to the diffusion loss.

    anneal_steps: steps over which a causal mask opens to the full one, 0 for the full mask at once: 'scattered' edges
    (DiffuLLaMA), or a horizon that moves ahead.
    blocks: block sizes before block_size, '1x500,4x500': 500 steps with blocks of 1, then 500 with blocks of 4.
    level_warmup: steps over which t_max grows from t_min, with weights of 1 meanwhile (Stable-DiffCoder, 2601.15892).
    half_life_steps: steps over which position-dependent masking grows from uniform to half_life.
    """

    name: str
    streams: Literal[1, 2]
    alignment: Literal["shifted", "same_position"]
    corruption: Literal["none", "uniform", "exact_count", "position_dependent"] = "uniform"
    block_size: int = 0
    half_life: float = 0.0
    anneal_steps: int = 0
    t_min: float = 1e-3
    t_max: float = 1.0
    levels: Literal["block", "sequence"] = "block"
    at_least_one: bool = False
    complementary: bool = False
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"
    weight: Literal["inverse_level", "inverse_count", "none", "cart"] = "inverse_level"
    normaliser: Literal["tokens", "masked", "masked_each"] = "tokens"
    ar_weight: float = 0.0
    kl_weight: float = 0.0
    annealing: Literal["scattered", "look_ahead"] = "scattered"
    blocks: str = ""
    level_warmup: int = 0
    half_life_steps: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            allowed, value = typing.get_args(field.type), getattr(self, field.name)
            if allowed and value not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise UserError(f"recipe '{self.name}': {field.name} must be {choices}, not {value!r}")
        for problem, found in {**self._ranges(), **self._contradictions()}.items():
            if found:
                raise UserError(f"recipe '{self.name}': {problem}")

    def _ranges(self) -> dict[str, bool]:
        negative = [key for key in ("anneal_steps", "level_warmup", "half_life_steps", "ar_weight", "kl_weight")
                    if getattr(self, key) < 0]
        return {
            f"{''.join(negative[:1])} must not be negative": bool(negative),
            f"t_min must lie in (0, 1), not {self.t_min}": not 0 < self.t_min < 1,
            f"t_max must lie in (t_min, 1], not {self.t_max}": not self.t_min < self.t_max <= 1,
            f"block_size must not be negative, and with two streams be at least 1, not {self.block_size}":
                self.block_size < self.streams - 1,
        }

    def _contradictions(self) -> dict[str, bool]:
        two, positional = self.streams == 2, self.corruption == "position_dependent"
        phases = block_phases(self.blocks)
        return {
            "anneal_steps opens the causal mask of one stream to the full one; with blocks it must be 0":
                self.block_size > 0 and self.anneal_steps != 0,
            "half_life goes with position_dependent corruption in two streams, and only with it":
                positional != (self.half_life > 0) or (positional and not two),
            "half_life_steps goes with position_dependent corruption": self.half_life_steps > 0 and not positional,
            "without corruption there is one stream, shifted, and no other setting":
                self.corruption == "none" and not self._is_plain(),
            "a token_causal clean half needs two streams": self.clean_half == "token_causal" and not two,
            "ar_weight and kl_weight need a token_causal clean half, whose outputs know no future":
                self.ar_weight + self.kl_weight > 0 and self.clean_half != "token_causal",
            "blocks is a schedule for two streams; with one leave it empty": bool(phases) and not two,
            "levels of a sequence as a whole are for two streams; one stream has no others":
                self.levels == "sequence" and not two,
            "the weight cart looks at the neighbours in one stream; with two choose another":
                self.weight == "cart" and two,
            "complementary masks have the levels t and 1 - t, so 1/t needs a t_max of at most 1 - t_min; or choose "
            "the weight none or inverse_count":
                self.complementary and self.weight == "inverse_level" and self.t_max > 1 - self.t_min,
            "complementary leaves a block of one token without a mask half of the time, which at_least_one forbids; "
            "choose one of them": self.complementary and self.at_least_one,
        }

    def _is_plain(self) -> bool:
        """Whether the text is read in one stream, shifted, and nothing else is set but a range of levels."""
        free = {"name", "streams", "alignment", "corruption", "t_min", "t_max"}
        return (self.streams, self.alignment) == (1, "shifted") and all(
            getattr(self, field.name) == field.default for field in dataclasses.fields(self) if field.name not in free)

    @property
    def rule(self) -> Literal["causal", "bidirectional", "block_causal"]:
        """The rule under which the trained model denoises (a `Card.rule`)."""
        if self.corruption == "none":
            return "causal"
        return "block_causal" if self.block_size else "bidirectional"


def recipe_at(recipe: Recipe, step: int, length: int) -> Recipe:
    """The recipe of one step (from 0) on records of `length` tokens, with the size of its blocks settled: what a step
    is compiled for.

    A block of the whole record is one stream, at half the cost, where nothing else reads the clean half.
    """
    if not recipe.blocks:
        return recipe
    size = block_at(step, block_phases(recipe.blocks), recipe.block_size)
    if size >= length and recipe.corruption == "uniform" and not recipe.ar_weight and not recipe.kl_weight:
        return dataclasses.replace(recipe, name=f"{recipe.name}, whole records", blocks="", streams=1, block_size=0,
                                   clean_half="block_causal", levels="block")
    return dataclasses.replace(recipe, blocks="", block_size=size)
