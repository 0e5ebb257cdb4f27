"""Guidance: what the prompt adds to a prediction, exaggerated. Letters: v vocabulary."""

import jax

from dlm_jax.typing import Float32, shape_checked


@shape_checked
def guide(conditional: Float32[jax.Array, "*n v"], unconditional: Float32[jax.Array, "*n v"], scale: float
          ) -> Float32[jax.Array, "*n v"]:
    """Classifier-free guidance: moves the logits away from those without a prompt (LLaDA, arXiv 2502.09992)."""
    return unconditional + (scale + 1) * (conditional - unconditional)
