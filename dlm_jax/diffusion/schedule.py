"""Levels and schedules. alpha(t) = 1 - t: a token is masked with probability t, and t = 1 is all mask.

A schedule is a function of the step alone, so a run that goes on is where it was. Those that change numbers are traced;
the size of a block changes shapes, so it is asked for on the host and compiled once a size.
"""

import math
import re

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError

PHASE = re.compile(r"\s*(\d+)\s*x\s*(\d+)\s*")


def stratified_levels(key: jax.Array, shape: tuple[int, ...], t_min: float,
                      t_max: jax.Array | float = 1.0) -> jax.Array:
    """Levels t in (t_min, t_max], fp32 of `shape`, one in each of `size` equal strata, in random places.

    Every level is uniform on its own, and together they cover the range evenly, which takes the spread of t out of the
    variance of the loss (low-discrepancy sampling: Kingma et al. 2021, appendix I.1).
    """
    offset, place = jax.random.split(key)
    size = math.prod(shape)
    u = (jax.random.permutation(place, size) + jax.random.uniform(offset, ())) / size  # in [0, 1)
    return (t_max - (t_max - t_min) * u).reshape(shape)


def growth(step: jax.Array, steps: int) -> jax.Array:
    """Linear growth over `steps` steps, fp32: (step + 1) / steps at `step` (from 0), and 1 from step `steps` - 1 on.

    The share of the future that annealing shows (DiffuLLaMA, section 3.2), of the levels that a warm-up draws from, and
    of the slope of position-dependent masking. `steps` = 0 is all at once.
    """
    return jnp.minimum(1.0, (step + 1) / max(steps, 1)).astype(jnp.float32)


def block_phases(text: str) -> tuple[tuple[int, int], ...]:
    """'1x500,4x500' as ((1, 500), (4, 500)): so many steps with blocks of 1, then so many with blocks of 4.

    Raises `UserError` for anything else.
    """
    phases = [PHASE.fullmatch(part) for part in text.split(",")] if text.strip() else []
    found = tuple((int(match[1]), int(match[2])) for match in phases if match)
    if len(found) < len(phases) or any(size < 1 or steps < 1 for size, steps in found):
        raise UserError(f"'{text}' is no schedule of blocks; write SIZExSTEPS,SIZExSTEPS such as 1x500,4x500")
    return found


def block_at(step: int, phases: tuple[tuple[int, int], ...], final: int) -> int:
    """The size of a block at `step` (from 0): that of its phase, or `final` once all are over.

    Sizes may grow (NBDiff, arXiv 2512.06776) or grow and shrink again (WSD of LLaDA2.0, arXiv 2512.15745).
    """
    for size, steps in phases:
        if step < steps:
            return size
        step -= steps
    return final


def linear(progress: jax.Array) -> jax.Array:
    """The masked share 1 - alpha after a share `progress` of the way: the even grid."""
    return 1.0 - progress


def cosine(progress: jax.Array) -> jax.Array:
    """As `linear`, but slow at first and fast at the end (MaskGIT, arXiv 2202.04200)."""
    return jnp.cos(progress * jnp.pi / 2)
