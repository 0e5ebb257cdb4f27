"""What a recipe is: streams, alignment, corruption, loss weights, losses and schedules that fit together."""

import dataclasses
import typing
from typing import Literal

from dlm_jax.diffusion.schedule import block_size_at, parse_block_schedule
from dlm_jax.errors import UserError
from dlm_jax.schema.ranges import MAX_BLOCK, check_ranges, non_negative, within


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is trained. Raises `UserError` for settings that contradict each other.

    In the comments t is the level of a block (the probability that a token is masked), m the number of its tokens that
    may be masked and k the number that are.
    """

    name: str  # by itself it changes nothing; `--config.recipe=NAME` sets all keys of a known recipe
    # 1: the model reads the corrupted text. 2: it reads [noisy || clean].
    streams: Literal[1, 2]
    # 'shifted': the output at n-1 predicts token n. 'same_position': the output at n predicts token n.
    alignment: Literal["shifted", "same_position"]
    # 'none': nothing, which is plain autoregressive training. 'uniform': each token independently with probability t.
    # 'exact_count': round(t m) tokens of each block. 'position_dependent': as many, and later tokens more often.
    # 'jacobi': the last round(t m), which are replaced by wrong guesses and not by masks; a noisy token then sees its
    # block up to itself, and the model stays an autoregressive one that decodes by Jacobi iteration.
    corruption: Literal["none", "uniform", "exact_count", "position_dependent", "jacobi"] = "uniform"
    # With two streams, the number of tokens that are denoised together. With one stream, 0 means the whole text;
    # otherwise a token sees its own block and earlier ones, which are noisy too (Efficient-DLM's ablation).
    block_size: int = within(0, MAX_BLOCK, 0)
    # Lambda of position-dependent corruption, the fraction of a block over which the masking weight doubles as t goes
    # to 0; 0 with the other corruptions.
    half_life: float = non_negative(0.0)
    # Steps over which a causal mask opens to the full one; 0 shows the full mask from the start.
    anneal_steps: int = non_negative(0)
    t_min: float = 1e-3  # levels are drawn from (t_min, t_max]
    t_max: float = 1.0  # the largest level
    # With two streams, one level per block or one per sequence.
    level_per: Literal["block", "sequence"] = "block"
    # Every block has at least one masked token.
    min_one_mask: bool = False
    # Each record is seen twice; the second time exactly those tokens are masked that were visible the first time.
    complementary: bool = False
    # What a clean token sees of the clean half: up to the end of its block ('block_causal') or up to itself
    # ('token_causal'). Two streams only.
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"
    # Weight of a masked token. 'inverse_level': 1/t. 'inverse_count': m/k. 'none': 1. 'cart': how close the visible
    # tokens are (Dream).
    loss_weight: Literal["inverse_level", "inverse_count", "none", "cart"] = "inverse_level"
    # What the sum of weighted losses is divided by, always counted over the global batch. 'tokens': the tokens that may
    # be masked, so that 1/t gives the NELBO. 'masked': the masked tokens (DiffuLLaMA's code). 'masked_each': the masked
    # tokens of each record, as that code does with micro-batches of one.
    normalizer: Literal["tokens", "masked", "masked_each"] = "tokens"
    # Weight of the next-token loss on a token-causal clean half; a mean over tokens, added to the diffusion loss.
    ar_weight: float = non_negative(0.0)
    # Weight of the divergence from the frozen base on a token-causal clean half; also a mean over tokens, and added.
    kl_weight: float = non_negative(0.0)
    # Weight of the entropy at masked tokens that the model already predicts (`cross_entropy.uncertainty`); weighted
    # like the loss, and added. Distills a model towards certainty on its own answers (dParallel).
    certainty_weight: float = non_negative(0.0)
    # How a mask opens over `anneal_steps`: 'scattered' opens random future edges (DiffuLLaMA); 'look_ahead' moves the
    # horizon ahead.
    annealing: Literal["scattered", "look_ahead"] = "scattered"
    # Block sizes that come before `block_size`: '1x500,4x500' is 500 steps with blocks of 1, then 500 with blocks of 4.
    block_schedule: str = ""
    # Steps over which t_max grows from t_min, with weights of 1 meanwhile (Stable-DiffCoder, arXiv 2601.15892).
    level_warmup: int = non_negative(0)
    # Steps over which position-dependent masking grows from uniform to `half_life`.
    half_life_steps: int = non_negative(0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            allowed, value = typing.get_args(field.type), getattr(self, field.name)
            if allowed and value not in allowed:
                choices = " or ".join(map(repr, allowed))
                raise UserError(f"recipe '{self.name}': {field.name} must be {choices}, not {value!r}")
        check_ranges(f"recipe '{self.name}': ", self)
        for wrong, sentence in [*self._ranges(), *self._contradictions()]:
            if wrong:
                raise UserError(f"recipe '{self.name}': {sentence}")

    def _ranges(self) -> list[tuple[bool, str]]:
        """(whether a number is out of range, the error message) for the numbers that depend on others."""
        return [
            (not 0 < self.t_min < 1, f"t_min must lie in (0, 1), not {self.t_min}"),
            (not self.t_min < self.t_max <= 1, f"t_max must lie in (t_min, 1], not {self.t_max}"),
            (self.streams == 2 and self.block_size < 1,
             f"block_size must be at least 1 with two streams, not {self.block_size}"),
        ]

    def _contradictions(self) -> list[tuple[bool, str]]:
        """(whether two settings contradict each other, the error message with the fix) for every contradiction."""
        two, positional = self.streams == 2, self.corruption == "position_dependent"
        return [
            (self.block_size > 0 and self.anneal_steps != 0,
             "anneal_steps opens the causal mask of one stream to the full one; with blocks it must be 0"),
            (positional != (self.half_life > 0) or (positional and not two),
             "half_life goes with position_dependent corruption in two streams; set both or neither"),
            (self.half_life_steps > 0 and not positional,
             "half_life_steps goes with position_dependent corruption; without it set half_life_steps to 0"),
            (self.corruption == "none" and not self._is_plain(),
             "without corruption there is one shifted stream; leave every other setting at its default"),
            (self.corruption == "jacobi" and (self.clean_half, self.alignment) != ("token_causal", "shifted"),
             "jacobi corruption trains an autoregressive model; set alignment to 'shifted' and clean_half to "
             "'token_causal'"),
            (self.corruption == "jacobi" and (self.complementary or self.min_one_mask),
             "jacobi corruption takes the ends of blocks; set complementary and min_one_mask to False"),
            (self.clean_half == "token_causal" and not two,
             "a token_causal clean half needs two streams; with one leave it block_causal"),
            (self.ar_weight + self.kl_weight > 0 and self.clean_half != "token_causal",
             "ar_weight and kl_weight need a token_causal clean half, whose outputs do not see the future"),
            (bool(parse_block_schedule(self.block_schedule)) and not two,
             "block_schedule needs two streams; with one leave it empty"),
            (self.level_per == "sequence" and not two,
             "level_per 'sequence' needs two streams; one stream has one level per sequence in any case"),
            (self.loss_weight == "cart" and two,
             "loss_weight 'cart' looks at the neighbors in one stream; with two streams choose another"),
            (self.complementary and self.loss_weight == "inverse_level" and self.t_max > 1 - self.t_min,
             "complementary masks have the levels t and 1 - t, so 1/t needs a t_max of at most 1 - t_min; lower it, or "
             "set loss_weight to 'none' or 'inverse_count'"),
            (self.complementary and self.min_one_mask,
             "complementary leaves a block of one token unmasked half of the time, which min_one_mask forbids; choose "
             "one of them"),
        ]

    def _is_plain(self) -> bool:
        """Whether the recipe is one shifted stream and sets nothing else but the range of levels."""
        free = {"name", "streams", "alignment", "corruption", "t_min", "t_max"}
        return self.streams == 1 and self.alignment == "shifted" and all(
            getattr(self, field.name) == field.default for field in dataclasses.fields(self) if field.name not in free)

    @property
    def rule(self) -> Literal["causal", "bidirectional", "block_causal"]:
        """The rule under which the trained model denoises (a `DiffusionSpec.rule`)."""
        if not self.masks:
            return "causal"
        return "block_causal" if self.block_size else "bidirectional"

    @property
    def masks(self) -> bool:
        """Whether the model learns to fill masks; otherwise it stays autoregressive, and has no mask token."""
        return self.corruption not in ("none", "jacobi")


def recipe_at(recipe: Recipe, step: int, length: int) -> Recipe:
    """The recipe of one training step (from 0) on records of `length` tokens, its block size resolved. A step is
    compiled once per distinct result.

    A block that covers the whole record is trained as one stream, at half the cost, unless a loss reads the clean half.
    """
    if not recipe.block_schedule:
        return recipe
    size = block_size_at(step, parse_block_schedule(recipe.block_schedule), recipe.block_size)
    if size >= length and recipe.corruption == "uniform" and not recipe.ar_weight and not recipe.kl_weight:
        return dataclasses.replace(recipe, name=f"{recipe.name}, whole records", block_schedule="", streams=1,
                                   block_size=0, clean_half="block_causal", level_per="block")
    return dataclasses.replace(recipe, block_schedule="", block_size=size)
