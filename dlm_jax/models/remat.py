"""Rematerialization: what of a layer is kept for the backward pass, and what is computed again, by named policies.

The model names its activations: `qkv`, the queries, keys and values as attention takes them, but where queries and keys
have a norm these as they are before it; `attention`, its output and, of a kernel, the log-sum-exp; `out_proj`, what the
attention half adds; `mlp_in`, the up and gate projections. What the backward pass needs beyond these is elementwise.
"""

from collections.abc import Callable

import jax

# The activations that each policy keeps; in `offload_projections` they wait in the memory of the host.
KEPT = {"full": (), "save_attention": ("attention",), "save_qkv": ("qkv", "attention", "out_proj"),
        "save_projections": ("qkv", "attention", "out_proj", "mlp_in"),
        "offload_projections": ("qkv", "attention", "out_proj", "mlp_in")}
# The weights whose product each activation is, under `layers.`. The last product of a layer is never needed again.
PRODUCTS = {"qkv": ("attention.q", "attention.k", "attention.v"), "attention": (), "out_proj": ("attention.o",),
            "mlp_in": ("mlp.gate", "mlp.up")}


def remat_layer(body: Callable, remat: str, qk_norm: bool = False) -> Callable:
    """`body`, the function of one layer, that keeps what `model.remat` says: everything with 'none'.

    qk_norm: whether the model has a norm of queries and keys. Its gradient needs what went into it, from which the
    rest follows.
    """
    if remat == "none":
        return body
    parts = {"qkv": ("qk_proj" if qk_norm else "qk", "v")}
    names = [name for kept in KEPT[remat] for name in parts.get(kept, (kept,))]
    policies = jax.checkpoint_policies
    policy = (policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=names, offload_src="device",
        offload_dst="pinned_host") if remat == "offload_projections" else policies.save_only_these_names(*names))
    return jax.checkpoint(body, policy=policy, prevent_cse=False)


def recomputed(remat: str) -> list[str]:
    """The activations that the backward pass computes again."""
    return [] if remat == "none" else [name for name in PRODUCTS if name not in KEPT[remat]]
