"""One table per family that maps Hugging Face tensors to our weights. Import and export both read it."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np

from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Weight, weight_table
from dlm_jax.typing import Array, Float, shape_checked

Leaf = TypeVar("Leaf", np.ndarray, jax.Array, Array)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A Hugging Face tensor, and those of our weights that it holds side by side on its output axis."""

    name: str  # with {i} for the layer index
    paths: tuple[str, ...]  # our weights
    transposed: bool = False  # stored [out, in], as in `nn.Linear`, rather than [in, out], as in GPT-2's `Conv1D`

    @property
    def stacked(self) -> bool:
        """Whether every layer has such a tensor; ours are then stacked over the layers."""
        return "{i}" in self.name

    def tensors(self, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
        """(Hugging Face name, layer index) of each such tensor; the index is None for a tensor outside the layers."""
        if not self.stacked:
            yield self.name, None
            return
        for i in range(config.depth):
            yield self.name.format(i=i), i


def gpt2_table() -> tuple[Entry, ...]:
    def both(name: str, *paths: str, weight: str = "weight") -> list[Entry]:
        return [Entry(f"{name}.weight", tuple(f"{p}.{weight}" for p in paths)),
                Entry(f"{name}.bias", tuple(f"{p}.bias" for p in paths))]

    block = "transformer.h.{i}"
    qkv = tuple(f"layers.attention.{p}" for p in "qkv")
    return (Entry("transformer.wte.weight", ("embed.tokens",)), Entry("transformer.wpe.weight", ("embed.positions",)),
            *both(f"{block}.ln_1", "layers.attention_norm", weight="scale"),
            *both(f"{block}.attn.c_attn", *qkv), *both(f"{block}.attn.c_proj", "layers.attention.o"),
            *both(f"{block}.ln_2", "layers.mlp_norm", weight="scale"),
            *both(f"{block}.mlp.c_fc", "layers.mlp.up"), *both(f"{block}.mlp.c_proj", "layers.mlp.down"),
            *both("transformer.ln_f", "final_norm", weight="scale"), Entry("lm_head.weight", ("head.weight",), True))


def llama_table() -> tuple[Entry, ...]:
    """LLaMA, Qwen2 and Qwen3 differ only in which of these tensors they have."""
    def linear(name: str, path: str) -> list[Entry]:
        return [Entry(f"{name}.weight", (f"{path}.weight",), True), Entry(f"{name}.bias", (f"{path}.bias",))]

    block = "model.layers.{i}"
    return (Entry("model.embed_tokens.weight", ("embed.tokens",)),
            Entry(f"{block}.input_layernorm.weight", ("layers.attention_norm.scale",)),
            *(entry for p in "qkvo" for entry in linear(f"{block}.self_attn.{p}_proj", f"layers.attention.{p}")),
            *(Entry(f"{block}.self_attn.{p}_norm.weight", (f"layers.attention.{p}_norm.scale",)) for p in "qk"),
            Entry(f"{block}.post_attention_layernorm.weight", ("layers.mlp_norm.scale",)),
            *(entry for p in ("gate", "up", "down") for entry in linear(f"{block}.mlp.{p}_proj", f"layers.mlp.{p}")),
            Entry("model.norm.weight", ("final_norm.scale",)), Entry("lm_head.weight", ("head.weight",), True))


TABLES: dict[str, Callable[[], tuple[Entry, ...]]] = {
    "gpt2": gpt2_table, "llama": llama_table, "qwen2": llama_table, "qwen3": llama_table}
# The name prefix that checkpoints of the bare transformer, without its language-model class, leave out.
PREFIX = {"gpt2": "transformer.", "llama": "model.", "qwen2": "model.", "qwen3": "model."}
EMBEDDING = {family: table()[0].name for family, table in TABLES.items()}
HEAD = "lm_head.weight"


def tensor_map(config: ModelConfig) -> list[Entry]:
    """The tensors of a checkpoint of `config`. Together they hold each weight exactly once."""
    weights = weight_table(config)
    return [entry for entry in TABLES[config.family]() if all(path in weights for path in entry.paths)]


def layer_shape(weight: Weight) -> tuple[int, ...]:
    """The shape of one of our weights in one layer, or its full shape if it belongs to no layer."""
    return weight.shape[1:] if weight.axes[0] == "layer" else weight.shape


def layer_slice(leaf: Leaf, layer: int | None) -> Leaf:
    """Layer number `layer` of a stacked leaf, a view for numpy; the leaf itself if `layer` is None."""
    return leaf if layer is None else leaf[layer]


def flat_shape(path: str, weight: Weight) -> tuple[int, ...]:
    """The shape of one of our weights in one layer with heads merged: [in, out] for a matrix, [out] for a vector."""
    shape = layer_shape(weight)
    if path.startswith("embed."):
        return shape
    if not path.endswith(".weight"):
        return (math.prod(shape),)
    # A matrix that writes into the residual stream has heads among its inputs; the others among their outputs.
    return (math.prod(shape[:-1]), shape[-1]) if weight.axes[-1] == "embed" else (shape[0], math.prod(shape[1:]))


def hf_shape(entry: Entry, weights: dict[str, Weight]) -> tuple[int, ...]:
    """The shape of the Hugging Face tensor: its weights are concatenated on the output axis."""
    shapes = [flat_shape(path, weights[path]) for path in entry.paths]
    joined = (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
    return joined[::-1] if entry.transposed else joined


@shape_checked
def from_hf(entry: Entry, array: Float[np.ndarray, "..."],
            weights: dict[str, Weight]) -> dict[str, Float[np.ndarray, "..."]]:
    """Our weights (of one layer), by path, from a Hugging Face tensor of shape `hf_shape(entry, weights)`."""
    array = array.T if entry.transposed else array
    widths = [flat_shape(path, weights[path])[-1] for path in entry.paths]
    arrays = np.split(array, np.cumsum(widths)[:-1], axis=-1)
    return {path: each.reshape(layer_shape(weights[path])) for path, each in zip(entry.paths, arrays)}


@shape_checked
def to_hf(entry: Entry, arrays: list[Float[np.ndarray, "..."]],
          weights: dict[str, Weight]) -> Float[np.ndarray, "..."]:
    """The inverse of `from_hf`: `arrays` are our weights (of one layer), in the order of `entry.paths`."""
    flat = [array.reshape(flat_shape(path, weights[path])) for path, array in zip(entry.paths, arrays)]
    joined = np.concatenate(flat, axis=-1) if len(flat) > 1 else flat[0]
    return joined.T if entry.transposed else joined
