"""Levels and schedules. alpha(t) = 1 - t: a token is masked with probability t, and t = 1 masks everything.

A schedule is a function of the step alone, so a resumed run continues exactly where it stopped. Schedules that change
numbers are traced; the block size changes shapes, so it is looked up on the host and compiled once per size.
"""

import math
import re

import jax
import jax.numpy as jnp

from dlm_jax.errors import UserError
from dlm_jax.typing import Array, Float, Float32, Int, Key, shape_checked

PHASE = re.compile(r"\s*(\d{1,9})\s*x\s*(\d{1,9})\s*")


@shape_checked
def stratified_levels(key: Key[Array, ""], shape: tuple[int, ...], t_min: float,
                      t_max: Float[Array, ""] | float = 1.0) -> Float32[Array, "..."]:
    """Levels t in (t_min, t_max] of `shape`: one in each of as many equal strata, in random order.

    Each level is uniform on its own, and together they cover the range evenly, which takes the variation of t out of
    the variance of the loss (low-discrepancy sampling: Kingma et al. 2021, appendix I.1).
    """
    offset_key, order_key = jax.random.split(key)
    size = math.prod(shape)
    u = (jax.random.permutation(order_key, size) + jax.random.uniform(offset_key, ())) / size  # in [0, 1)
    return (t_max - (t_max - t_min) * u).reshape(shape)


@shape_checked
def linear_ramp(step: Int[Array, "*steps"], steps: int) -> Float32[jax.Array, "*steps"]:
    """(step + 1) / steps, at most 1: rises linearly over `steps` steps (counted from 0). `steps` = 0 is 1 at once.

    It is the fraction of the future that annealing shows (DiffuLLaMA, section 3.2), of the range of levels that a
    warm-up draws from, and of the slope of position-dependent masking.
    """
    return jnp.minimum(1.0, (step + 1) / max(steps, 1)).astype(jnp.float32)


def parse_block_schedule(text: str) -> tuple[tuple[int, int], ...]:
    """'1x500,4x500' as ((1, 500), (4, 500)): (block size, number of steps) of each phase.

    Raises `UserError` for anything else.
    """
    matches = [PHASE.fullmatch(part) for part in text.split(",")] if text.strip() else []
    phases = tuple((int(match[1]), int(match[2])) for match in matches if match)
    if len(phases) < len(matches) or any(size < 1 or steps < 1 for size, steps in phases):
        raise UserError(f"'{text}' is not a block schedule; write SIZExSTEPS,SIZExSTEPS such as 1x500,4x500")
    return phases


def block_size_at(step: int, phases: tuple[tuple[int, int], ...], final: int) -> int:
    """The block size at `step` (from 0): that of its phase, or `final` after the last one.

    Sizes may grow (NBDiff, arXiv 2512.06776), or grow and shrink again (WSD of LLaDA2.0, arXiv 2512.15745).
    """
    for size, steps in phases:
        if step < steps:
            return size
        step -= steps
    return final


def linear(progress: jax.Array) -> jax.Array:
    """The fraction of tokens still masked, 1 - alpha, at `progress` in [0, 1] through denoising: the even grid.

    Schedules of denoising are named for users by `SCHEDULES` in `sampling/unmasking.py`.
    """
    return 1.0 - progress


def cosine(progress: jax.Array) -> jax.Array:
    """As `linear`, but slow at first and fast at the end (MaskGIT, arXiv 2202.04200)."""
    return jnp.cos(progress * jnp.pi / 2)
