"""Long texts split over devices: the mesh axis `context` (context parallelism).

For c devices a row is cut into 2c chunks, and device i has the chunks i and 2c - 1 - i. Under a causal or block-causal
mask the two together see as much as any other pair (Llama 3, arXiv 2407.21783, section 3.3.2), and so they do with two
streams, [noisy || clean], where one of them is noisy and the other clean. Each device computes the layers for its own
tokens. For attention it gathers the keys and values of the row, which are few with grouped-query attention; their
gradients are summed and scattered on the way back.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from dlm_jax.parallel.mesh import axis_size, batch_axes
from dlm_jax.typing import Array


def splits_tokens(length: int) -> bool:
    """Whether rows of so many tokens are split over `context`, in the mesh of the program being traced."""
    devices = axis_size("context")
    return devices > 1 and length % (2 * devices) == 0


def balance(x: Array) -> jax.Array:
    """[b, n, ...] from the order of the text to that of the devices: one after the other, their two chunks each."""
    devices = axis_size("context")
    first, second = jnp.split(x.reshape(len(x), 2 * devices, -1, *x.shape[2:]), 2, axis=1)
    return jnp.stack([first, second[:, ::-1]], 2).reshape(x.shape)


def gather_tokens(x: jax.Array) -> jax.Array:
    """The row of which this device has two chunks, [b, n / c, ...] -> [b, n, ...] in the order of the text, inside a
    shard_map."""
    first, second = (jax.lax.all_gather(chunk, "context", axis=1) for chunk in jnp.split(x, 2, axis=1))
    return jnp.concatenate([first, second[:, ::-1]], 1).reshape(len(x), -1, *x.shape[2:])


def restore(x: jax.Array) -> jax.Array:
    """[b, n, d] from the order of the devices to that of the text, in which each has one run of tokens."""
    def own_run(x: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(gather_tokens(x), jax.lax.axis_index("context") * x.shape[1], x.shape[1], 1)

    spec = PartitionSpec(batch_axes(len(x)), "context")
    return jax.shard_map(own_run, in_specs=spec, out_specs=spec, check_vma=False)(x)
