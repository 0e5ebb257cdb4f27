"""The one table of parameters: initialization, conversion, weight decay and (by its axes) sharding all read it.

Parameters are a nested dict of arrays. The weights of all layers are stacked into one array, layers on axis 0, for
`jax.lax.scan`. A path such as `layers.attention.q.weight` names a leaf.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from dlm_jax.models.adapters import adapted_paths
from dlm_jax.models.config import ModelConfig

MASK_VECTOR = "embed.mask"  # added to the embedding of the mask token where the model has mask adapters
Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Weight:
    """Shape, logical axes and initial values of one weight."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # the meaning of each axis: 'layer', 'vocab', 'embed', 'heads', ...
    std: float = 0.0  # of the normal distribution that a matrix is initialized from
    constant: float = 0.0  # the initial value of a bias or a norm scale

    @property
    def decays(self) -> bool:
        """Weight decay acts on matrices, never on biases and norm scales."""
        return self.std > 0.0


def weight_table(config: ModelConfig) -> dict[str, Weight]:
    """Every weight of `config` by path, in the order of the forward pass."""
    c = config
    sizes = dict(layer=c.depth, vocab=c.vocab_size, embed=c.width, heads=c.heads, kv_heads=c.kv_heads,
                 head_dim=c.head_dim, mlp=c.mlp_width, position=c.max_length)
    table: dict[str, Weight] = {}

    def add(path: str, axes: str, std: float = 0.0, constant: float = 0.0) -> None:
        names = tuple(axes.split())
        table[path] = Weight(tuple(sizes[a] for a in names), names, std, constant)

    def matrix(path: str, inputs: str, outputs: str, bias: bool, std: float = 0.02) -> None:
        add(f"{path}.weight", f"layer {inputs} {outputs}", std)
        if bias:
            add(f"{path}.bias", f"layer {outputs}")

    def norm(path: str, axes: str) -> None:
        add(f"{path}.scale", axes, constant=1.0)
        if c.norm == "layer":
            add(f"{path}.bias", axes)

    # As in GPT-2, the matrices that write into the residual stream start smaller, by the square root of their number.
    residual_std = 0.02 / math.sqrt(2 * c.depth)
    add("embed.tokens", "vocab embed", 0.02)
    if c.rope is None:
        add("embed.positions", "position embed", 0.02)
    norm("layers.attention_norm", "layer embed")
    matrix("layers.attention.q", "embed", "heads head_dim", c.qkv_bias)
    matrix("layers.attention.k", "embed", "kv_heads head_dim", c.qkv_bias)
    matrix("layers.attention.v", "embed", "kv_heads head_dim", c.qkv_bias)
    if c.qk_norm:
        add("layers.attention.q_norm.scale", "layer head_dim", constant=1.0)
        add("layers.attention.k_norm.scale", "layer head_dim", constant=1.0)
    matrix("layers.attention.o", "heads head_dim", "embed", c.output_bias, residual_std)
    norm("layers.mlp_norm", "layer embed")
    if c.mlp == "swiglu":
        matrix("layers.mlp.gate", "embed", "mlp", c.mlp_bias)
    matrix("layers.mlp.up", "embed", "mlp", c.mlp_bias)
    matrix("layers.mlp.down", "mlp", "embed", c.mlp_bias, residual_std)
    norm("final_norm", "embed")
    if not c.tied_head:
        add("head.weight", "embed vocab", 0.02)
    if c.mask_adapters is not None:
        add(MASK_VECTOR, "embed")
        table |= adapters_of(table, c.mask_adapters.target_modules, c.mask_adapters.rank)
    return table


def adapters_of(table: dict[str, Weight], target_modules: str, rank: int) -> dict[str, Weight]:
    """The low-rank adapters of matrices by path: A has the input axes of its matrix, B the output axes."""
    found = {}
    for path, w in table.items():
        if path.startswith(adapted_paths(target_modules)) and path.endswith(".weight"):
            stem, outputs = path.removesuffix(".weight"), 1 + input_axis_count(w)  # after the layers and the inputs
            std = 1 / math.sqrt(math.prod(w.shape[1:outputs]))
            found[f"{stem}.a"] = Weight((*w.shape[:outputs], rank), (*w.axes[:outputs], "rank"), std)
            found[f"{stem}.b"] = Weight((w.shape[0], rank, *w.shape[outputs:]), ("layer", "rank", *w.axes[outputs:]))
    return found


def input_axis_count(w: Weight) -> int:
    """How many axes of a layer's matrix are inputs: one, or all but the last if it writes into the residual stream."""
    return len(w.axes) - 2 if w.axes[-1] == "embed" else 1


def map_table(config: ModelConfig, function: Callable[[str, Weight], Any]) -> Params:
    """A tree like the parameters whose leaf at `path` is `function(path, weight)`."""
    return unflatten_dict({path: function(path, w) for path, w in weight_table(config).items()}, sep=".")


def init(config: ModelConfig, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
    """Random initial parameters, for training from scratch."""
    paths = list(weight_table(config))
    keys = dict(zip(paths, jax.random.split(key, len(paths)), strict=True))

    def draw(path: str, w: Weight) -> jax.Array:
        if w.std:
            return (w.std * jax.random.normal(keys[path], w.shape)).astype(dtype)
        return jnp.full(w.shape, w.constant, dtype)

    return map_table(config, draw)


def parameter_count(config: ModelConfig) -> int:
    """The number of parameters."""
    return sum(math.prod(w.shape) for w in weight_table(config).values())


def flatten(params: Params) -> dict[str, Any]:
    """Leaves by path."""
    return flatten_dict(params, sep=".")


def unflatten(leaves: dict[str, Any]) -> Params:
    """The inverse of `flatten`."""
    return unflatten_dict(leaves, sep=".")
