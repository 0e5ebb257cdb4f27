"""Dataclasses that are pytrees.

`flax.struct` and `jax.tree_util.register_dataclass` do the same, but jaxlib compares the structures of two such
dataclasses without their classes: `BlockCausal(4)` equals `CausalThenLastBlock(4)`, and whenever their hashes share a
slot, `jit` runs the program of one for the other. Classes registered as below are told apart.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar, dataclass_transform

import jax

T = TypeVar("T")


def field(*, pytree_node: bool = True, **arguments: Any) -> Any:
    """A field; with `pytree_node=False` it is static: a part of the tree's structure, hashable, and no array."""
    return dataclasses.field(metadata={"pytree_node": pytree_node}, **arguments)


@dataclass_transform(field_specifiers=(field,), frozen_default=True)
def dataclass(cls: type[T]) -> type[T]:
    """The class as a frozen dataclass whose instances are pytrees of their fields, those that are static aside."""
    data = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(data)  # type: ignore[arg-type]
    static = [f.name for f in fields if not f.metadata.get("pytree_node", True)]
    arrays = [f.name for f in fields if f.name not in static]

    def flatten(x: T) -> tuple[tuple, tuple]:
        return tuple(getattr(x, name) for name in arrays), tuple(getattr(x, name) for name in static)

    def flatten_with_keys(x: T) -> tuple[list, tuple]:
        children, values = flatten(x)
        return list(zip(map(jax.tree_util.GetAttrKey, arrays), children, strict=True)), values

    def unflatten(values: tuple, children: Iterable) -> T:
        return data(**dict(zip(static, values, strict=True)), **dict(zip(arrays, children, strict=True)))

    jax.tree_util.register_pytree_with_keys(data, flatten_with_keys, unflatten, flatten)
    return data
