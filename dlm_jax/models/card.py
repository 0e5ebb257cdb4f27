"""What a checkpoint says of itself beyond its architecture: how it is to be read as a diffusion language model."""

import dataclasses
from typing import Literal

from dlm_jax.errors import UserError

ALIGNMENTS = ("shifted", "same_position")
RULES = ("causal", "bidirectional", "block_causal")
CLEAN_HALVES = ("block_causal", "token_causal")
# Under token_causal the last block sees itself and all before it, and what is before it sees itself left to right.
VISIBILITIES = (*RULES, "token_causal")


@dataclasses.dataclass(frozen=True)
class Card:
    """The part of `dlm.json` that is not the architecture.

    alignment: `shifted`, the output at n-1 predicts token n; `same_position`, the output at n predicts token n.
    rule: what a token sees when the model denoises: `causal` marks a plain autoregressive model.
    block_size: tokens of a block; only with the rule `block_causal`.
    clean_half: how the finished text before a block sees itself, with the rule `block_causal`: in blocks
    (`block_causal`), or left to right (`token_causal`), which makes it an autoregressive model as well.
    mask_token_id: the id of the mask token, None for a plain autoregressive model.
    bos_token_id: the token that a text starts with; eos_token_id: the token that ends it. None where there is none.
    """

    alignment: Literal["shifted", "same_position"] = "shifted"
    rule: Literal["causal", "bidirectional", "block_causal"] = "causal"
    block_size: int | None = None
    mask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    recipe: str | None = None
    base_model: str | None = None
    base_revision: str | None = None
    clean_half: Literal["block_causal", "token_causal"] = "block_causal"

    def __post_init__(self) -> None:
        if self.alignment not in ALIGNMENTS:
            raise UserError(f"alignment '{self.alignment}' is not one of {', '.join(ALIGNMENTS)}")
        if self.rule not in RULES:
            raise UserError(f"rule '{self.rule}' is not one of {', '.join(RULES)}")
        if (self.rule == "block_causal") != (self.block_size is not None):
            raise UserError("block_size goes with the rule block_causal, and only with it; got rule "
                            f"'{self.rule}' and block_size {self.block_size}")
        if self.block_size is not None and self.block_size < 1:
            raise UserError(f"block_size must be at least 1, not {self.block_size}")
        if self.clean_half not in CLEAN_HALVES:
            raise UserError(f"clean_half '{self.clean_half}' is not one of {', '.join(CLEAN_HALVES)}")
        if self.clean_half == "token_causal" and self.rule != "block_causal":
            raise UserError(f"clean_half token_causal goes with the rule block_causal, not with '{self.rule}'")

    @property
    def visibility(self) -> str:
        """What a token of a text sees whose last block is being denoised: one of `VISIBILITIES`."""
        return "token_causal" if self.clean_half == "token_causal" else self.rule

    @property
    def is_diffusion(self) -> bool:
        """Whether the model was made to denoise; a plain autoregressive model was not."""
        return self.rule != "causal"

    @property
    def start_id(self) -> int | None:
        """The token that a text starts with: bos, or eos where a family (GPT-2) has one token for both."""
        return self.eos_token_id if self.bos_token_id is None else self.bos_token_id

    @classmethod
    def from_dict(cls, fields: dict) -> "Card":
        """The inverse of `dataclasses.asdict`."""
        try:
            return cls(**fields)
        except TypeError as error:
            raise UserError(f"the diffusion settings do not fit this version of dlm-jax: {error}") from None
