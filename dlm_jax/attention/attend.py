"""The one door to attention. Behind it: the dense reference, and what is faster where it runs."""

import jax

from dlm_jax.attention.cpu import attend_cpu
from dlm_jax.attention.plan import Plan, prepare
from dlm_jax.attention.reference import attend_reference
from dlm_jax.attention.rules import Rule
from dlm_jax.errors import UserError

IMPLEMENTATIONS = ("auto", "reference", "cpu")


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule | Plan, segments: jax.Array | None = None,
           implementation: str = "auto") -> jax.Array:
    """Attention under a mask rule.

    q: [batch, length, heads, head_dim]; k, v: [batch, length, kv_heads, head_dim], as in
    `jax.nn.dot_product_attention`; segments: int [batch, length], the document of each token (0 is padding), or None.
    implementation: `reference` is the readable one; `cpu` the same in the shapes that a CPU likes; `auto` picks by the
    platform. Returns [batch, length, heads, head_dim] in q's dtype. Raises `UserError` for an unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention implementation '{implementation}' is not one of {', '.join(IMPLEMENTATIONS)}")
    plan = prepare(rule, k.shape[1], segments, q.shape[1])
    if implementation == "auto":
        return jax.lax.platform_dependent(q, k, v, plan, cpu=attend_cpu, default=attend_reference)
    return (attend_cpu if implementation == "cpu" else attend_reference)(q, k, v, plan)
