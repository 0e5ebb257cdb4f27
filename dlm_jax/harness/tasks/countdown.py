"""Countdown: reach the last number from the others by arithmetic (Gandhi et al. 2024; Ye et al. 2024 for diffusion)."""

from typing import Any

from dlm_jax.training.rewards import reaches_target


def process_results(document: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The harness's grade of one document."""
    return {"acc": float(reaches_target(document["input"], results[0]))}
