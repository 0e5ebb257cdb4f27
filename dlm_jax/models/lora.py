"""Low-rank adapters (LoRA, arXiv 2106.09685): a second parameter tree, merged into the model's by a function.

A matrix W that maps x to x W becomes W + (alpha / rank) A B with A [inputs, rank] random and B [rank, outputs] zero, so
that training starts at the base. The adapter of `layers.attention.q.weight` is `lora.layers.attention.q.a` and `.b`.
The model computes with the merged weights and is unaware of adapters; only trained weights have optimizer moments.

Gated adapters are not merged: they act on mask tokens only and belong to the model (`adapters.MaskAdapters`). That of
the same matrix is `layers.attention.q.a` and `.b`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError
from dlm_jax.models.adapters import MAX_RANK, TARGET_MODULES, MaskAdapters, check_names, comma_separated
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import MASK_VECTOR, Params, Weight, adapters_of, flatten, unflatten, weight_table
from dlm_jax.schema.ranges import check_ranges, positive_fp32, within
from dlm_jax.typing import Array, Float, shape_checked

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
    # The adapters act on mask tokens only: what the model says about a text without masks does not change.
    gated: bool = False

    def __post_init__(self) -> None:
        check_names("lora.target_modules", self.target_modules, TARGET_MODULES)
        check_names("lora.modules_to_save", self.modules_to_save, SAVED_MODULES)
        check_ranges("lora.", self)
        if self.rank and not comma_separated(self.target_modules):
            raise UserError("lora.target_modules is empty; name attention, mlp or both, or set lora.rank to 0")
        if self.gated and not self.rank:
            raise UserError("lora.gated is for adapters and lora.rank is 0; set a rank, such as 16")
        if self.gated and comma_separated(self.modules_to_save) != ["embeddings"]:
            raise UserError("lora.gated trains a vector for the mask token and nothing else beside the adapters; leave "
                            "lora.modules_to_save at 'embeddings'")

    @property
    def scale(self) -> float:
        """The factor of the product A B."""
        return self.alpha / self.rank


def with_mask_adapters(config: ModelConfig, lora: Lora, mask_id: int | None) -> ModelConfig:
    """The config of the model that has gated adapters, or the same one if they are not asked for. Raises `UserError`
    for a model that has others already."""
    if not lora.gated:
        return config
    assert mask_id is not None, "a recipe with masks"
    adapters = MaskAdapters(mask_id, lora.rank, lora.scale, lora.target_modules)
    if config.mask_adapters not in (None, adapters):
        raise UserError(f"the base has mask adapters of rank {config.mask_adapters.rank} already; train on with the "
                        "lora settings that it was trained with")
    return dataclasses.replace(config, mask_adapters=adapters)


def trained_table(config: ModelConfig, lora: Lora) -> dict[str, Weight]:
    """Every weight that is trained: all of the model's, or the saved modules and the adapters."""
    table = weight_table(config)
    if not lora.rank:
        return table
    adapters = adapters_of(table, lora.target_modules, lora.rank)
    if lora.gated:
        return {MASK_VECTOR: table[MASK_VECTOR]} | adapters
    parts = [SAVED_MODULES[name] for name in comma_separated(lora.modules_to_save)]
    saved = {path: w for path, w in table.items() if any(part in path for part in parts)}
    return saved | {f"lora.{path}": w for path, w in adapters.items()}


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
