"""The one door to attention. Behind it: the dense reference, and for each platform what is fast there."""

import functools
import importlib
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from dlm_jax.attention.plan import Plan, prepare
from dlm_jax.attention.rules import Rule
from dlm_jax.attention.tiles import TILE
from dlm_jax.errors import UserError
from dlm_jax.mesh import AXES, BATCH, shares

IMPLEMENTATIONS = ("auto", "reference", "cpu", "tpu", "gpu", "splash")
PLATFORM = {"tpu": "tpu", "splash": "tpu", "gpu": "gpu"}  # what an implementation must be traced for


def attend(q: jax.Array, k: jax.Array, v: jax.Array, rule: Rule | Plan, segments: jax.Array | None = None,
           implementation: str = "auto") -> jax.Array:
    """Attention under a mask rule, or under the plan that `prepare` made of one.

    q: [batch, length, heads, head_dim]; k, v: [batch, length, kv_heads, head_dim], as in
    `jax.nn.dot_product_attention`; segments: int [batch, length], the document of each token (0 is padding), or None.
    Returns [batch, length, heads, head_dim] in q's dtype.

    implementation: `reference` is the readable one; `cpu` the same in the shapes that a CPU likes; `tpu` and `gpu` are
    Pallas kernels; `splash` is the kernel that comes with jax, for static rules without documents; `auto` takes the
    platform's own and logs which, once. In a mesh (`dlm_jax.mesh`) each device attends for its share of batch and
    heads. Raises `UserError` for an unknown implementation and for one that cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention implementation '{implementation}' is not one of {', '.join(IMPLEMENTATIONS)}")
    plan = prepare(rule, k.shape[1], segments, q.shape[1])
    traced_for = platform()
    if implementation == "auto":
        implementation = choice(traced_for, q)
        announce(implementation, traced_for)
    elif PLATFORM.get(implementation, traced_for) != traced_for:
        needed = PLATFORM[implementation].upper()
        raise UserError(f"attention implementation '{implementation}' runs on a {needed} only, and this program is for "
                        f"a {traced_for.upper()}; use 'auto'")
    return each_device(function_of(implementation), q, k, v, plan)


def platform() -> str:
    """What the program is traced for: `cpu`, `gpu` or `tpu`; the mesh decides, where it names a device."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        kind = abstract.device_kind.lower()
        return "tpu" if kind.startswith("tpu") else "cpu" if kind == "cpu" else "gpu"
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return device if isinstance(device, str) else device.platform


def choice(traced_for: str, q: jax.Array) -> str:
    """The implementation for a platform, a shape and a dtype: what no kernel takes is dense work, and so are fewer
    queries than a kernel's tile."""
    if traced_for == "cpu":
        return "cpu"
    long = q.shape[1] >= TILE
    if traced_for == "gpu":
        taken = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= TILE and is_hopper()
        return "gpu" if long and taken else "reference"
    return "tpu" if long else "reference"


def is_hopper() -> bool:
    """Whether the program is for a GPU with the instructions that the GPU kernel is made of (sm_90)."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    kind = abstract.device_kind if abstract is not None else jax.devices()[0].device_kind
    return any(name in kind for name in ("H100", "H200", "H20", "H800"))


@functools.cache
def announce(implementation: str, traced_for: str) -> None:
    """Logs the choice, the first time that it is made; on a CPU, where there is one, for those who ask for details."""
    level = logging.DEBUG if traced_for == "cpu" else logging.INFO
    logging.getLogger(__name__).log(level, "attention: '%s' on this %s", implementation, traced_for.upper())


def function_of(implementation: str) -> Callable[..., jax.Array]:
    """The function of a name. Kernels are imported when they are asked for: Pallas takes a second."""
    module = importlib.import_module(f"dlm_jax.attention.{implementation}")
    return getattr(module, f"attend_{implementation}")


def each_device(function: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
    """`function(q, k, v, plan)`; in a mesh, by each device for its share of batch and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if shares(*AXES) == 1 or AxisType.Manual in mesh.axis_types:
        return function(q, k, v, plan)
    if k.shape[2] % shares("tensor"):
        raise UserError(f"mesh.tensor {shares('tensor')} does not divide the {k.shape[2]} key-value heads; choose one "
                        "that does")
    batch = BATCH if q.shape[0] % shares(*BATCH) == 0 else None
    spec = PartitionSpec(batch, None, "tensor", None)

    def share(x: Any) -> PartitionSpec:
        return PartitionSpec(batch if x.shape[0] > 1 else None)

    return jax.shard_map(function, in_specs=(spec, spec, spec, jax.tree.map(share, plan)), out_specs=spec,
                         check_vma=False)(q, k, v, plan)
