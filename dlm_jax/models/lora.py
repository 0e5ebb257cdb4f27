"""Low-rank adapters (LoRA, arXiv 2106.09685): a second parameter tree, merged into the model's by a function.

A matrix W that maps x to x W becomes W + (alpha / rank) A B with A [inputs, rank] random and B [rank, outputs] zero, so
that training starts at the base. The adapter of `layers.attention.q.weight` is `lora.layers.attention.q.a` and `.b`.
The model computes with the merged weights and is unaware of adapters; only trained weights have optimizer moments.
"""

import dataclasses
import math
from collections.abc import Collection

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params, Weight, flatten, unflatten, weight_table
from dlm_jax.schema.ranges import check_ranges, positive_fp32, within
from dlm_jax.typing import Array, Float, shape_checked

MAX_RANK = 2**14
TARGET_MODULES = {"attention": "layers.attention.", "mlp": "layers.mlp."}  # how the paths of a module begin
SAVED_MODULES = {"embeddings": "embed.", "norms": "norm", "head": "head."}  # what the paths of a module contain


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which weights are trained. The words are PEFT's. Raises `UserError` for values that make no sense."""

    rank: int = within(0, MAX_RANK, 0)  # 0 trains all weights, without adapters
    alpha: float = positive_fp32(32.0)  # the product A B is scaled by alpha / rank
    target_modules: str = "attention,mlp"  # the modules that get adapters: 'attention', 'mlp', or both with a comma
    # What is trained in full beside the adapters, of 'embeddings', 'norms' and 'head'. A new mask token needs
    # 'embeddings': its row starts at the mean of the others.
    modules_to_save: str = "embeddings"

    def __post_init__(self) -> None:
        check_names("lora.target_modules", self.target_modules, TARGET_MODULES)
        check_names("lora.modules_to_save", self.modules_to_save, SAVED_MODULES)
        check_ranges("lora.", self)
        if self.rank and not comma_separated(self.target_modules):
            raise UserError("lora.target_modules is empty; name attention, mlp or both, or set lora.rank to 0")

    @property
    def scale(self) -> float:
        """The factor of the product A B."""
        return self.alpha / self.rank


def check_names(key: str, text: str, known: Collection[str]) -> None:
    """Raises `UserError` where the comma-separated `text` has a name that is not known."""
    unknown = [name for name in comma_separated(text) if name not in known]
    if unknown:
        raise UserError(f"{key}: '{unknown[0]}' is not one of {', '.join(known)}")


def comma_separated(text: str) -> list[str]:
    """'a, b' as ['a', 'b']."""
    return [name.strip() for name in text.split(",") if name.strip()]


def adapter_table(config: ModelConfig, lora: Lora) -> dict[str, Weight]:
    """The adapters' weights by path: A has the input axes of its matrix, B the output axes."""
    prefixes = tuple(TARGET_MODULES[name] for name in comma_separated(lora.target_modules))
    table = {}
    for path, w in weight_table(config).items():
        if path.startswith(prefixes) and path.endswith(".weight"):
            stem = "lora." + path.removesuffix(".weight")
            outputs = 1 + input_axis_count(w)  # the first output axis: after the layers and the inputs
            a, b = (*w.shape[:outputs], lora.rank), (w.shape[0], lora.rank, *w.shape[outputs:])
            std = 1 / math.sqrt(math.prod(w.shape[1:outputs]))
            table[f"{stem}.a"] = Weight(a, (*w.axes[:outputs], "rank"), std)
            table[f"{stem}.b"] = Weight(b, ("layer", "rank", *w.axes[outputs:]))
    return table


def input_axis_count(w: Weight) -> int:
    """How many axes of a layer's matrix are inputs: one, or all but the last if it writes into the residual stream."""
    return len(w.axes) - 2 if w.axes[-1] == "embed" else 1


def trained_table(config: ModelConfig, lora: Lora) -> dict[str, Weight]:
    """Every weight that is trained: all of the model's, or the saved modules and the adapters."""
    table = weight_table(config)
    if not lora.rank:
        return table
    parts = [SAVED_MODULES[name] for name in comma_separated(lora.modules_to_save)]
    saved = {path: w for path, w in table.items() if any(part in path for part in parts)}
    return saved | adapter_table(config, lora)


def split_trained(params: Params, config: ModelConfig, lora: Lora, key: jax.Array) -> tuple[Params, Params]:
    """(trained, frozen): the weights of `trained_table`, new adapters among them, and the rest of `params`."""
    if not lora.rank:
        return params, {}
    leaves, trained = flatten(params), {}
    for index, (path, w) in enumerate(trained_table(config, lora).items()):
        new = w.std * jax.random.normal(jax.random.fold_in(key, index), w.shape)
        trained[path] = leaves.pop(path) if path in leaves else new
    return unflatten(trained), unflatten(leaves)


def merge_trained(trained: Params, frozen: Params, lora: Lora) -> Params:
    """The model's parameters with the adapters merged. Before training this is the inverse of `split_trained`."""
    if not lora.rank:
        return trained
    leaves = flatten(trained) | flatten(frozen)
    adapters = {path: leaves.pop(path) for path in list(leaves) if path.startswith("lora.")}
    return merge(unflatten(leaves), unflatten(adapters), lora.scale)


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """The parameters with scale * A B of each adapter added to its matrix."""
    leaves, factors = flatten(params), flatten(adapters)
    for stem in {path.rpartition(".")[0] for path in factors}:
        path = stem.removeprefix("lora.") + ".weight"
        leaves[path] = leaves[path] + scale * adapter_product(factors[f"{stem}.a"], factors[f"{stem}.b"])
    return unflatten(leaves)


def unmerge(params: Params, adapters: Params, scale: float) -> Params:
    """The inverse of `merge`, up to rounding."""
    return merge(params, adapters, -scale)


@shape_checked
def adapter_product(a: Float[Array, "layers ... rank"], b: Float[Array, "layers rank ..."]
                    ) -> Float[jax.Array, "layers ..."]:
    """A times B, layer by layer: [layers, inputs..., outputs...]."""
    return jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(jnp.asarray(a), jnp.asarray(b))
