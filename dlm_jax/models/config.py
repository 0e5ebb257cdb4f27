"""One frozen architecture config that spans GPT-2, LLaMA, Qwen2 and Qwen3."""

import dataclasses
from dataclasses import field
from typing import Literal

from dlm_jax.errors import UserError
from dlm_jax.models.adapters import MaskAdapters
from dlm_jax.schema.ranges import between, check_ranges, positive_fp32, within
from dlm_jax.schema.record import from_json

MAX_DEPTH, MAX_WIDTH, MAX_ROWS = 2**12, 2**20, 2**26  # of layers, of an axis of a weight, of an embedding
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary position embedding (Su et al. 2021), and how its frequencies are scaled for long contexts."""

    theta: float = positive_fp32(10_000.0)  # the base of the geometric progression of frequencies
    # 'linear' divides every position by `factor`. 'llama3' divides only the frequencies whose wavelength is longer than
    # original_length / low_factor, keeps those shorter than original_length / high_factor, and interpolates between.
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: float = positive_fp32(1.0)
    low_factor: float = positive_fp32(1.0)
    high_factor: float = positive_fp32(4.0)
    original_length: int = within(1, MAX_ROWS, 8192)  # the context that the model was first trained on, in tokens

    def __post_init__(self) -> None:
        check_ranges("the rotary embedding's ", self)
        if self.scaling == "llama3" and self.low_factor >= self.high_factor:
            raise UserError(f"llama3 interpolates between a low frequency factor {self.low_factor} and a high one "
                            f"{self.high_factor}, so the first must be the smaller one; correct them")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The architecture: everything that decides the shapes of the weights and the mathematics of the forward pass.

    Raises `UserError` for values that do not fit together.
    """

    # The Hugging Face layout that the weights are imported from and exported to. The forward pass reads only the fields
    # below.
    family: Literal["gpt2", "llama", "qwen2", "qwen3"]
    vocab_size: int = field(metadata=between(1, MAX_ROWS))
    width: int = field(metadata=between(1, MAX_WIDTH))  # of the residual stream
    depth: int = field(metadata=between(1, MAX_DEPTH))  # number of layers
    heads: int = field(metadata=between(1, MAX_WIDTH))  # query heads
    # Key-value heads; `heads` is a multiple of it (grouped-query attention).
    kv_heads: int = field(metadata=between(1, MAX_WIDTH))
    head_dim: int = field(metadata=between(1, MAX_WIDTH))
    mlp_width: int = field(metadata=between(1, MAX_WIDTH))
    max_length: int = field(metadata=between(1, MAX_ROWS))  # context, in tokens
    rope: Rope | None  # None: learned absolute positions
    norm: Literal["layer", "rms"]
    norm_eps: float = field(metadata=between(0, 1))
    mlp: Literal["gelu", "swiglu"]
    qkv_bias: bool = False  # of the query, key and value projections
    output_bias: bool = False  # of the attention output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of queries and keys, per head
    tied_head: bool = True  # the head is the transposed token embedding
    mask_adapters: MaskAdapters | None = None  # what the model has learned beside its base, for mask tokens only

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise UserError(f"unknown model family '{self.family}'; the families are {', '.join(FAMILIES)}")
        check_ranges("the model's ", self)
        if self.heads % self.kv_heads:
            raise UserError(f"{self.heads} heads cannot share {self.kv_heads} key-value heads; make the first a "
                            "multiple of the second")
        if self.rope is not None and self.head_dim % 2:
            raise UserError(f"rotary positions need an even head_dim, not {self.head_dim}")
        if self.qk_norm and self.rope is None:
            raise UserError("qk_norm goes with rotary positions, and the model has learned ones; drop it")
        if self.mask_adapters is not None and not 0 <= self.mask_adapters.mask_token_id < self.vocab_size:
            raise UserError(f"the mask adapters are for the token {self.mask_adapters.mask_token_id}, which is not in "
                            f"the vocabulary of {self.vocab_size}; correct it")

    @classmethod
    def from_dict(cls, fields: object) -> "ModelConfig":
        """The inverse of `dataclasses.asdict`. Raises `UserError` for fields of another version or type."""
        return from_json(cls, fields, "the model description")
