"""What a checkpoint states beyond its architecture: how to run it as a diffusion language model."""

import dataclasses
from typing import Literal

from dlm_jax.errors import UserError
from dlm_jax.schema.ranges import MAX_BLOCK, check_ranges, within
from dlm_jax.schema.record import from_json

ALIGNMENTS = ("shifted", "same_position")
RULES = ("causal", "bidirectional", "block_causal")
CLEAN_HALVES = ("block_causal", "token_causal")
# Under token_causal the last block sees itself and everything before it; the text before it is causal.
VISIBILITIES = (*RULES, "token_causal")


@dataclasses.dataclass(frozen=True)
class DiffusionSpec:
    """The part of `dlm.json` that is not the architecture. Raises `UserError` for settings that are out of range or
    contradict each other."""

    # 'shifted': the output at n-1 predicts token n. 'same_position': the output at n predicts token n.
    alignment: Literal["shifted", "same_position"] = "shifted"
    # What a token sees when the model denoises; 'causal' marks a plain autoregressive model.
    rule: Literal["causal", "bidirectional", "block_causal"] = "causal"
    block_size: int | None = within(1, MAX_BLOCK, None)  # tokens per block; only with the rule 'block_causal'
    mask_token_id: int | None = None  # None for a plain autoregressive model
    bos_token_id: int | None = None  # the token that a text starts with; None where there is none
    eos_token_id: int | None = None  # the token that ends a text; None where there is none
    recipe: str | None = None  # the recipe that it was trained with
    base_model: str | None = None  # the model that training started from
    base_revision: str | None = None  # the revision of that model on the hub
    # With the rule 'block_causal', how the finished text before a block sees itself: in blocks ('block_causal'), or
    # left to right ('token_causal'), which makes it an autoregressive model as well.
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise UserError(f"alignment '{self.alignment}' is not one of {', '.join(ALIGNMENTS)}")
        if self.rule not in RULES:
            raise UserError(f"rule '{self.rule}' is not one of {', '.join(RULES)}")
        if (self.rule == "block_causal") != (self.block_size is not None):
            raise UserError("block_size goes with the rule block_causal, and only with it; got rule "
                            f"'{self.rule}' and block_size {self.block_size}")
        check_ranges("the diffusion model's ", self)
        if self.clean_half not in CLEAN_HALVES:
            raise UserError(f"clean_half '{self.clean_half}' is not one of {', '.join(CLEAN_HALVES)}")
        if self.clean_half == "token_causal" and self.rule != "block_causal":
            raise UserError(f"clean_half token_causal goes with the rule block_causal, not with '{self.rule}'")

    @property
    def visibility(self) -> str:
        """What a token sees in a text whose last block is being denoised: one of `VISIBILITIES`."""
        return "token_causal" if self.clean_half == "token_causal" else self.rule

    @property
    def is_diffusion(self) -> bool:
        """Whether the model was trained to denoise; a plain autoregressive model was not."""
        return self.rule != "causal"

    @property
    def start_id(self) -> int | None:
        """The token that a text starts with: bos, or eos where a family uses one token for both (GPT-2)."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    def as_autoregressive(self) -> "DiffusionSpec":
        """The same model, decoded left to right."""
        return dataclasses.replace(self, rule="causal", alignment="shifted", block_size=None,
                                   clean_half="block_causal")

    @classmethod
    def from_dict(cls, fields: dict) -> "DiffusionSpec":
        """The inverse of `dataclasses.asdict`. Raises `UserError` for fields of another version, or of another type."""
        return from_json(cls, fields, "the description of the diffusion model")
