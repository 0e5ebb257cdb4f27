"""One frozen architecture config that spans GPT-2, LLaMA, Qwen2 and Qwen3."""

import dataclasses
from typing import Literal

from dlm_jax.errors import UserError

FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021), and how its frequencies are scaled for long contexts."""

    theta: float = 10_000.0  # the base of the geometric progression of frequencies
    # 'linear' divides every position by `factor`. 'llama3' divides only the frequencies whose wavelength is longer than
    # original_length / low_factor, keeps those shorter than original_length / high_factor, and interpolates between.
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = 1.0
    low_factor: float = 1.0
    high_factor: float = 4.0
    original_length: int = 8192  # the context that the model was first trained on, in tokens


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: everything that decides the shapes of the weights and the mathematics of the forward pass.

    Raises `UserError` for values that do not fit together.
    """

    # The Hugging Face layout that the weights are imported from and exported to. The forward pass reads only the fields
    # below.
    family: Literal["gpt2", "llama", "qwen2", "qwen3"]
    vocab_size: int
    width: int  # of the residual stream
    depth: int  # number of layers
    heads: int  # query heads
    kv_heads: int  # key-value heads; `heads` is a multiple of it (grouped-query attention)
    head_dim: int
    mlp_width: int
    max_length: int  # context, in tokens
    rope: Rope | None  # None: learned absolute positions
    norm: Literal["layer", "rms"]
    norm_eps: float
    mlp: Literal["gelu", "swiglu"]
    qkv_bias: bool = False  # of the query, key and value projections
    output_bias: bool = False  # of the attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of queries and keys, per head
    tied_head: bool = True  # the head is the transposed token embedding

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"unknown model family '{self.family}'; the families are {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads; make the first a "
                            "multiple of the second")
        if self.rope is not None and self.head_dim % 2:
            raise UserError(f"rotary positions need an even head_dim, not {self.head_dim}")

    @classmethod
    def from_dict(cls, fields: dict) -> "ModelConfig":
        """The inverse of `dataclasses.asdict`. Raises `UserError` for fields of another version."""
        rope = fields.get("rope")
        try:
            return cls(**{**fields, "rope": None if rope is None else Rope(**rope)})
        except TypeError as error:
            raise UserError(f"the model description does not fit this version of dlm-jax: {error}") from None
