"""Shapes and dtypes as annotations: `Float[Array, "b n d"]` is a floating-point array with three named axes.

Letters: b batch, n tokens (queries Q, keys K), d width, h heads, g key-value heads, k head_dim, v vocabulary. A letter
is one size throughout a call; `#b` may also be 1. Functions marked `@shape_checked` verify this on every call
where DLM_JAX_CHECK_SHAPES is set, as the tests do; elsewhere the mark costs nothing.
"""

import os
from collections.abc import Callable
from typing import TypeVar, cast

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, Int32, Key, Shaped, UInt32, jaxtyped

__all__ = ["Array", "Bool", "Float", "Float32", "Hidden", "Int", "Int32", "Key", "Logits", "Mask", "PerSequence",
           "Segments", "Shaped", "Tokens", "UInt32", "shape_checked"]

Array = jax.Array | np.ndarray
Tokens = Int[Array, "b n"]
Segments = Int[Array, "b n"]  # the document of each token, from 1; 0 is padding
Mask = Bool[Array, "b n"]
Hidden = Float[Array, "b n d"]
Logits = Float[Array, "b n v"]
PerSequence = Shaped[Array, "b 1"] | float | int  # one number for each sequence, or one for all

Function = TypeVar("Function", bound=Callable)


def shape_checked(function: Function) -> Function:
    """`function` with its annotations verified where DLM_JAX_CHECK_SHAPES is set: then a call whose arguments or result
    have another shape or dtype raises a `TypeError`."""
    if not os.environ.get("DLM_JAX_CHECK_SHAPES"):
        return function
    from beartype import beartype
    return cast(Function, jaxtyped(function, typechecker=beartype))
