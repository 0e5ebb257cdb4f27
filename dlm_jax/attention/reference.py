"""Dense attention: readable, exact, and the oracle for every kernel."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dlm_jax.attention.plan import Plan
from dlm_jax.typing import Array, Bool, Float, shape_checked


@shape_checked
def attend_reference(q: Float[Array, "b Q h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"],
                     plan: Plan) -> Float[jax.Array, "b Q h k"]:
    """`attend_dense` under the mask of a plan."""
    q, k, v = checkpoint_name(q, "qk"), checkpoint_name(k, "qk"), checkpoint_name(v, "v")
    return checkpoint_name(attend_dense(q, k, v, plan.visible(jnp.arange(k.shape[1], dtype=jnp.int32))), "attention")


@shape_checked
def attend_dense(q: Float[Array, "b Q h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"],
                 mask: Bool[Array, "#b Q K"]) -> Float[jax.Array, "b Q h k"]:
    """softmax(q kᵀ / sqrt(head_dim)) v over the visible keys, with the softmax in fp32 and the result in v's dtype.

    A query that sees nothing gives zero. Query head i reads key-value head i // (h / g).
    """
    b, n, h, d = q.shape
    g = k.shape[2]
    q = (q * d**-0.5).reshape(b, n, g, h // g, d)
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    m_i = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, -1, keepdims=True), -1e30))
    p = jnp.exp(scores - m_i)
    l_i = jnp.maximum(jnp.sum(p, -1, keepdims=True), 1e-30)
    out = jnp.einsum("bgrqk,bkgd->bqgrd", (p / l_i).astype(v.dtype), v)
    return out.reshape(b, n, h, d)
