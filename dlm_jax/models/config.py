"""One frozen description that spans GPT-2, LLaMA, Qwen2 and Qwen3."""

import dataclasses
from typing import Literal

from dlm_jax.errors import UserError

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021) and how its frequencies are stretched for long contexts.

    `linear` divides every position by `factor`; `llama3` divides only the frequencies whose wavelength is longer than
    `original_length / low_factor`, leaves those shorter than `original_length / high_factor`, and blends between.
    """

    theta: float = 10_000.0
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: everything that decides the shapes of the weights and the mathematics of the forward pass.

    `family` names the Hugging Face layout that the weights are imported from and exported to; the forward pass itself
    reads only the fields below it. `rope=None` means learned absolute positions.
    """

    family: Literal["gpt2", "llama", "qwen2", "qwen3"]
    vocab_size: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    max_length: int
    rope: Rope | None
    norm: Literal["layer", "rms"]
    norm_eps: float
    mlp: Literal["gelu", "swiglu"]
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tied_head: bool = True

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"unknown model family '{self.family}'; the families are {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads; the first must be a "
                            "multiple of the second")
        if self.rope is not None and self.head_dim % 2:
            raise UserError(f"rotary positions need an even head_dim, not {self.head_dim}")

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """The inverse of `dataclasses.asdict`."""
        rope = fields.get("rope")
        try:
            return cls(**{**fields, "rope": None if rope is None else Rope(**rope)})
        except TypeError as error:
            raise UserError(f"the model description does not fit this version of dlm-jax: {error}") from None
