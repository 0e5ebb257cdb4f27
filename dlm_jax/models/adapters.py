"""Which matrices get low-rank adapters, and adapters that act on mask tokens only."""

import dataclasses
from collections.abc import Collection

from dlm_jax.errors import UserError
from dlm_jax.schema.ranges import between, check_ranges, positive_fp32

MAX_RANK = 2**14
TARGET_MODULES = {"attention": "layers.attention.", "mlp": "layers.mlp."}  # how the paths of a module begin


@dataclasses.dataclass(frozen=True)
class MaskAdapters:
    """Adapters that act where the input is the mask token and nowhere else (gated LoRA, arXiv 2507.11851), and a vector
    that is added to its embedding. A text without masks is read as by the model without them, bit for bit.

    Raises `UserError` for values that make no sense.
    """

    mask_token_id: int
    rank: int = dataclasses.field(metadata=between(1, MAX_RANK))
    scale: float = positive_fp32()  # of the product A B
    target_modules: str = "attention,mlp"

    def __post_init__(self) -> None:
        check_names("target_modules", self.target_modules, TARGET_MODULES)
        check_ranges("the mask adapters' ", self)


def adapted_paths(target_modules: str) -> tuple[str, ...]:
    """How the paths of the matrices begin that get adapters."""
    return tuple(TARGET_MODULES[name] for name in comma_separated(target_modules))


def check_names(key: str, text: str, known: Collection[str]) -> None:
    """Raises `UserError` where the comma-separated `text` has a name that is not known."""
    unknown = [name for name in comma_separated(text) if name not in known]
    if unknown:
        raise UserError(f"{key}: '{unknown[0]}' is not one of {', '.join(known)}")


def comma_separated(text: str) -> list[str]:
    """'a, b' as ['a', 'b']."""
    return [name.strip() for name in text.split(",") if name.strip()]
