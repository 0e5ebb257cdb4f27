"""Rotary position embeddings (RoFormer, arXiv 2104.09864) of queries and keys."""

import importlib

import jax
import jax.numpy as jnp

from dlm_jax.attention.dispatch import per_device, traced_platform
from dlm_jax.attention.tiles import TILE
from dlm_jax.parallel.context import splits_tokens
from dlm_jax.typing import Array, Float, shape_checked


@shape_checked
def rotate_heads(q: Float[Array, "b n h k"], k: Float[Array, "b n g k"], angles: Float[Array, "#b n planes"]
                 ) -> tuple[Float[jax.Array, "b n h k"], Float[jax.Array, "b n g k"]]:
    """`rotate` of both, by a kernel where there is one."""
    if has_kernel(q):
        kernel = importlib.import_module("dlm_jax.attention.rope_tpu")  # importing Pallas takes a second
        return per_device(kernel.rotate_tpu, (q, k), angles, splits_tokens(q.shape[1]))
    return rotate(q, angles), rotate(k, angles)


def has_kernel(q: Array) -> bool:
    """Whether kernels for queries and keys of this shape run on the platform of the program being traced."""
    return traced_platform() == "tpu" and q.shape[1] >= TILE and q.shape[3] % TILE == 0


def at_least_fp32(x: Array) -> jax.Array:
    """x in fp32, or in fp64 where the caller works in it."""
    return jnp.asarray(x).astype(jnp.promote_types(x.dtype, jnp.float32))


@shape_checked
def rotate(x: Float[Array, "b n h k"], angles: Float[Array, "#b n planes"]) -> Float[jax.Array, "b n h k"]:
    """Rotates the k/2 planes (x_i, x_{i + k/2}) of x by `angles` (the half-split layout), in at least fp32."""
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    a, b = jnp.split(at_least_fp32(x), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)
