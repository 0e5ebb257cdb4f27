"""RMS norm of queries and keys before their rotation, as in Qwen3."""

import functools
import importlib

import jax
import jax.numpy as jnp

from dlm_jax.attention.dispatch import per_device
from dlm_jax.attention.rope import at_least_fp32, has_kernel, rotate_heads
from dlm_jax.parallel.context import splits_tokens
from dlm_jax.typing import Array, Float, shape_checked


@shape_checked
def norm_and_rotate_heads(q: Float[Array, "b n h k"], k: Float[Array, "b n g k"], q_scale: Float[Array, " k"],
                          k_scale: Float[Array, " k"], angles: Float[Array, "#b n planes"], eps: float
                          ) -> tuple[Float[jax.Array, "b n h k"], Float[jax.Array, "b n g k"]]:
    """`rms_norm` of each head, then `rotate_heads`; both by one kernel where there is one."""
    if has_kernel(q):
        kernel = importlib.import_module("dlm_jax.attention.qk_norm_tpu")  # importing Pallas takes a second
        function = functools.partial(kernel.norm_and_rotate_tpu, eps=eps)
        return per_device(function, (q, k), angles, splits_tokens(q.shape[1]), (q_scale, k_scale))
    return rotate_heads(rms_norm(q, q_scale, eps), rms_norm(k, k_scale, eps), angles)


@shape_checked
def rms_norm(x: Float[Array, "*n d"], scale: Float[Array, " d"], eps: float) -> Float[jax.Array, "*n d"]:
    """x / rms(x) * scale (Zhang & Sennrich 2019), computed in fp32."""
    y = at_least_fp32(x)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + eps)
    return y.astype(x.dtype) * scale
