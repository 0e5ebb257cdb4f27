"""A hash of words that runs on any device."""

import jax
import jax.numpy as jnp

from dlm_jax.typing import Array


def hash32(x: Array) -> jax.Array:
    """A bijective 32-bit integer hash with good avalanche (the constants of C. Wellons's 'lowbias32'): uint32, of x's
    shape."""
    bits = jnp.asarray(x).astype(jnp.uint32)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x7FEB352D)
    bits = (bits ^ (bits >> 15)) * jnp.uint32(0x846CA68B)
    return bits ^ (bits >> 16)
