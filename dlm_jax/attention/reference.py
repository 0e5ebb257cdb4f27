"""Dense attention: readable, exact, and the oracle for every kernel."""

import jax
import jax.numpy as jnp

from dlm_jax.attention.plan import Plan


def attend_reference(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
    """`attend_dense` under the mask of a plan."""
    return attend_dense(q, k, v, plan.visible(jnp.arange(k.shape[1], dtype=jnp.int32)))


def attend_dense(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q kᵀ / sqrt(head_dim)) v over the visible keys, softmax in fp32; a row that sees nothing gives zero.

    q: [batch, Q, heads, head_dim]; k, v: [batch, K, kv_heads, head_dim]; mask: bool [batch or 1, Q, K].
    Returns [batch, Q, heads, head_dim] in q's dtype. Query head h reads key-value head h // (heads / kv_heads).
    """
    b, n, h, d = q.shape
    g = k.shape[2]
    q = (q * d**-0.5).reshape(b, n, g, h // g, d)
    scores = jnp.einsum("bqgrd,bkgd->bgrqk", q, k, preferred_element_type=jnp.promote_types(q.dtype, jnp.float32))
    mask = mask[:, None, None]
    scores = jnp.where(mask, scores, -jnp.inf)
    peak = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, -1, keepdims=True), -1e30))
    weights = jnp.exp(scores - peak)
    total = jnp.maximum(jnp.sum(weights, -1, keepdims=True), 1e-30)
    out = jnp.einsum("bgrqk,bkgd->bqgrd", (weights / total).astype(v.dtype), v)
    return out.reshape(b, n, h, d)
