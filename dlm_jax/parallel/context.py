"""Long texts split over devices: the mesh axis `context` (context parallelism).

A row is dealt out in stripes of up to `STRIPE` tokens: of c devices, device i has the stripes i, i + c, i + 2c, ... So
under any mask all devices see about as much, also with two streams (Striped Attention, arXiv 2311.09431). Each computes
the layers for its own tokens. For attention it gathers the keys and values of the whole row, which are few with
grouped-query attention; their gradients are summed and scattered on the way back.
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlm_jax.parallel.mesh import axis_size, batch_axes
from dlm_jax.typing import Array

STRIPE = 128  # tokens: a tile of the attention kernels


def splits_tokens(length: int) -> bool:
    """Whether rows of so many tokens are split over `context`, in the mesh of the program being traced."""
    devices = axis_size("context")
    return devices > 1 and length % devices == 0


def deal(x: Array) -> jax.Array:
    """[b, n, ...] from the order of the text to that of the devices: one after the other, their stripes each."""
    devices = axis_size("context")
    stripe = math.gcd(x.shape[1] // devices, STRIPE)
    stripes = jnp.asarray(x).reshape(len(x), -1, devices, stripe, *x.shape[2:])
    return stripes.swapaxes(1, 2).reshape(x.shape)


def gather_tokens(x: jax.Array) -> jax.Array:
    """The row of which this device has its stripes, [b, n / c, ...] -> [b, n, ...] in the order of the text, inside a
    shard_map."""
    stripe = math.gcd(x.shape[1], STRIPE)
    stripes = jax.lax.all_gather(x.reshape(len(x), -1, stripe, *x.shape[2:]), "context", axis=2)
    return stripes.reshape(len(x), -1, *x.shape[2:])


def restore(x: jax.Array) -> jax.Array:
    """[b, n, d] from the order of the devices to that of the text, in which each has one run of tokens."""
    def own_run(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(gather_tokens(x), jax.lax.axis_index("context") * x.shape[1], x.shape[1], 1)

    spec = PartitionSpec(batch_axes(len(x)), "context")
    return jax.shard_map(own_run, in_specs=spec, out_specs=spec, check_vma=False)(x)
