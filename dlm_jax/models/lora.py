"""Low-rank adapters (LoRA, arXiv 2106.09685): a tree beside the tree, merged by a function.

A matrix W that maps x to x W becomes W + (alpha / rank) A B with A [inputs, rank] random and B [rank, outputs] zero, so
that training starts at the base. The adapter of `layers.attention.q.weight` is `lora.layers.attention.q.a` and `.b`.
Training goes through the merged weights, so the model knows nothing of adapters; only what is trained has moments.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params, Weight, flatten, unflatten, weight_table

PARTS = {"attention": "layers.attention.", "mlp": "layers.mlp."}
WHOLE = {"embeddings": "embed.", "norms": "norm", "head": "head."}


@dataclasses.dataclass(frozen=True)
class Lora:
    """rank: 0 trains all weights. alpha: the adapters' product counts alpha / rank. targets: what has adapters,
    'attention', 'mlp', or both with a comma. whole: what is trained as it is, of 'embeddings', 'norms' and 'head' (the
    first for a new mask token, which starts at a mean)."""

    rank: int = 0
    alpha: float = 32.0
    targets: str = "attention,mlp"
    whole: str = "embeddings"

    def __post_init__(self) -> None:
        for key, value, known in (("targets", self.targets, PARTS), ("whole", self.whole, WHOLE)):
            unknown = [name for name in names(value) if name not in known]
            if unknown:
                raise UserError(f"lora.{key}: '{unknown[0]}' is not one of {', '.join(known)}")
        if self.rank < 0 or self.alpha <= 0:
            raise UserError(f"lora.rank must not be negative and lora.alpha must be positive, not {self.rank} and "
                            f"{self.alpha}")
        if self.rank and not names(self.targets):
            raise UserError("lora.targets is empty; name attention, mlp or both, or set lora.rank to 0")

    @property
    def scale(self) -> float:
        """What the product of a and b counts."""
        return self.alpha / self.rank


def names(text: str) -> list[str]:
    """'a, b' as ['a', 'b']."""
    return [name.strip() for name in text.split(",") if name.strip()]


def adapter_table(config: ModelConfig, lora: Lora) -> dict[str, Weight]:
    """The adapters' weights by path: a with the input axes of its matrix, b with the output axes."""
    table = {}
    for path, w in weight_table(config).items():
        if path.endswith(".weight") and any(path.startswith(PARTS[name]) for name in names(lora.targets)):
            cut, stem = 1 + input_axes(w), "lora." + path.removesuffix(".weight")
            a, b = (*w.shape[:cut], lora.rank), (w.shape[0], lora.rank, *w.shape[cut:])
            table[f"{stem}.a"] = Weight(a, (*w.axes[:cut], "rank"), 1 / math.sqrt(math.prod(w.shape[1:cut])))
            table[f"{stem}.b"] = Weight(b, ("layer", "rank", *w.axes[cut:]))
    return table


def input_axes(w: Weight) -> int:
    """How many axes of a layer's matrix are its input: all but the last where it writes into the residual stream."""
    return len(w.axes) - 2 if w.axes[-1] == "embed" else 1


def trained_table(config: ModelConfig, lora: Lora) -> dict[str, Weight]:
    """Every weight that is trained: all of the model's, or the adapters and what is trained whole."""
    table = weight_table(config)
    if not lora.rank:
        return table
    whole = {path: w for path, w in table.items() if any(WHOLE[name] in path for name in names(lora.whole))}
    return whole | adapter_table(config, lora)


def split(params: Params, config: ModelConfig, lora: Lora, key: jax.Array) -> tuple[Params, Params]:
    """The parameters as what is trained (see `trained_table`), and what stays."""
    if not lora.rank:
        return params, {}
    leaves, trained = flatten(params), {}
    for number, (path, w) in enumerate(trained_table(config, lora).items()):
        new = w.std * jax.random.normal(jax.random.fold_in(key, number), w.shape)
        trained[path] = leaves.pop(path) if path in leaves else new
    return unflatten(trained), unflatten(leaves)


def join(trained: Params, frozen: Params, lora: Lora) -> Params:
    """The model's parameters, adapters merged: the inverse of `split` before training, and what it came to after."""
    if not lora.rank:
        return trained
    leaves = flatten(trained) | flatten(frozen)
    adapters = {path: leaves.pop(path) for path in list(leaves) if path.startswith("lora.")}
    return merge(unflatten(leaves), unflatten(adapters), lora.scale)


def merge(params: Params, adapters: Params, scale: float) -> Params:
    """The parameters with each adapter's scale * a b added to its matrix."""
    leaves, parts = flatten(params), flatten(adapters)
    for stem in {path.rpartition(".")[0] for path in parts}:
        path = stem.removeprefix("lora.") + ".weight"
        leaves[path] = leaves[path] + scale * product(parts[f"{stem}.a"], parts[f"{stem}.b"])
    return unflatten(leaves)


def unmerge(params: Params, adapters: Params, scale: float) -> Params:
    """The inverse of `merge`, to rounding."""
    return merge(params, adapters, -scale)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a [layer, ..., rank] times b [layer, rank, ...], layer by layer."""
    return jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(jnp.asarray(a), jnp.asarray(b))
