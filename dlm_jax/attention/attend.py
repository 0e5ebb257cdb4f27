"""The one door to attention. Behind it: the dense reference, and what is faster where it runs."""

import jax

from dlm_jax.attention.cpu import attend_cpu
from dlm_jax.attention.reference import attend_dense
from dlm_jax.attention.rules import Dense, Rule, dense_mask
from dlm_jax.errors import UserError

IMPLEMENTATIONS = ("auto", "reference", "cpu")


def prepare(rule: Rule | Dense, keys: int, segments: jax.Array | None = None, queries: int | None = None,
            first: jax.Array | int = 0) -> Dense:
    """What `attend` needs of `rule` and is the same in every layer, made once a step. See `dense_mask`."""
    return rule if isinstance(rule, Dense) else Dense(dense_mask(rule, keys, segments, queries, first))


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule | Dense, segments: jax.Array | None = None,
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
        return jax.lax.platform_dependent(q, k, v, plan.mask, cpu=attend_cpu, default=attend_dense)
    return (attend_cpu if implementation == "cpu" else attend_dense)(q, k, v, plan.mask)
