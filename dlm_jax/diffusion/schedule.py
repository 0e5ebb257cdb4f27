"""Levels and schedules. alpha(t) = 1 - t: a token is masked with probability t, and t = 1 is all mask."""

import math

import jax
import jax.numpy as jnp


def stratified_levels(key: jax.Array, shape: tuple[int, ...], t_min: float) -> jax.Array:
    """Levels t in (t_min, 1], fp32 of `shape`, one in each of `size` equal strata, in random places.

    Every level is uniform on its own, and together they cover the range evenly, which takes the spread of t out of the
    variance of the loss (low-discrepancy sampling: Kingma et al. 2021, appendix I.1).
    """
    offset, place = jax.random.split(key)
    size = math.prod(shape)
    u = (jax.random.permutation(place, size) + jax.random.uniform(offset, ())) / size  # in [0, 1)
    return (1.0 - (1.0 - t_min) * u).reshape(shape)


def annealing_probability(step: jax.Array, steps: int) -> jax.Array:
    """Share of the future that is visible at `step` (from 0): grows linearly and is 1 from step `steps` - 1 on.

    DiffuLLaMA, section 3.2; `steps` = 0 opens everything at once.
    """
    return jnp.minimum(1.0, (step + 1) / max(steps, 1)).astype(jnp.float32)


def linear(progress: jax.Array) -> jax.Array:
    """The masked share 1 - alpha after a share `progress` of the way: the even grid."""
    return 1.0 - progress


def cosine(progress: jax.Array) -> jax.Array:
    """As `linear`, but slow at first and fast at the end (MaskGIT, arXiv 2202.04200)."""
    return jnp.cos(progress * jnp.pi / 2)
