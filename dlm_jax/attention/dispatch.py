"""The single entry point to attention: it dispatches to the dense reference or to what is fast on each platform."""

import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from dlm_jax.attention.plan import Plan, make_plan, own_tiles
from dlm_jax.attention.rules import Rule
from dlm_jax.attention.tiles import TILE
from dlm_jax.errors import UserError
from dlm_jax.parallel.context import gather_tokens
from dlm_jax.parallel.device_specs import traced_device_kind
from dlm_jax.parallel.mesh import AXES, MeshAxes, axis_size, batch_axes
from dlm_jax.typing import Array, Float, Int, shape_checked

IMPLEMENTATIONS = ("auto", "reference", "cpu", "tpu", "gpu", "splash")
REQUIRED_PLATFORM = {"tpu": "tpu", "splash": "tpu", "gpu": "gpu"}  # the others run anywhere


@shape_checked
def attend(q: Float[Array, "b Q h k"], k: Float[Array, "b K g k"], v: Float[Array, "b K g k"], rule: Rule | Plan,
           segments: Int[Array, "b K"] | None = None, implementation: str = "auto") -> Float[jax.Array, "b Q h k"]:
    """Attention under a mask rule, or under the plan that `make_plan` built from one, in q's dtype.

    The layout is that of `jax.nn.dot_product_attention`. segments: the document of each token (0 is padding), or None.

    implementation: `reference` is the readable one; `cpu` computes the same in the shapes that a CPU likes; `tpu` and
    `gpu` are our own Pallas kernels; `splash` is the kernel that ships with jax, for static rules without documents;
    `auto` picks the one for the platform and logs its choice once. In a mesh (`dlm_jax.parallel.mesh`) each device
    attends for its own slice of batch and heads; under a split plan for its own queries (`parallel.context`).

    Raises `UserError` for an unknown implementation, and for one that cannot run here.
    """
    if implementation not in IMPLEMENTATIONS:
        raise UserError(f"attention implementation '{implementation}' is not one of {', '.join(IMPLEMENTATIONS)}")
    plan = make_plan(rule, k.shape[1], segments, q.shape[1])
    platform = traced_platform()
    if implementation == "auto":
        implementation = choose_implementation(platform, q)
        log_choice(implementation, platform)
    elif REQUIRED_PLATFORM.get(implementation, platform) != platform:
        needed = REQUIRED_PLATFORM[implementation].upper()
        raise UserError(f"attention implementation '{implementation}' runs on a {needed} only, and this program is for "
                        f"a {platform.upper()}; use 'auto'")
    function = load_implementation(implementation)
    return per_device(attend_gathered(function) if plan.split else function, (q, k, v), plan, plan.split)


def attend_gathered(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function` for a device's own queries under its part of a split plan, inside a shard_map."""
    def attend_own(q: jax.Array, k: jax.Array, v: jax.Array, plan: Plan) -> jax.Array:
        k, v = gather_tokens(k), gather_tokens(v)
        return function(q, k, v, own_tiles(plan, k.shape[1]))

    return attend_own


def traced_platform() -> str:
    """The platform that the program is traced for: `cpu`, `gpu` or `tpu`. A mesh that names a device decides."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None:
        kind = abstract.device_kind.lower()
        if kind.startswith("tpu"):
            return "tpu"
        return "cpu" if kind == "cpu" else "gpu"
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    return device if isinstance(device, str) else device.platform


def choose_implementation(platform: str, q: Array) -> str:
    """The implementation for a platform and the shape and dtype of q. The reference takes what no kernel supports, and
    fewer queries than fill a kernel's tile."""
    if platform == "cpu":
        return "cpu"
    fills_a_tile = q.shape[1] >= TILE
    if platform == "gpu":
        supported = q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= TILE and is_hopper()
        return "gpu" if fills_a_tile and supported else "reference"
    return "tpu" if fills_a_tile else "reference"


def is_hopper() -> bool:
    """Whether the program is for a GPU with the instructions that the GPU kernels use (sm_90)."""
    kind = traced_device_kind()
    return any(name in kind for name in ("H100", "H200", "H20", "H800"))


@functools.cache
def log_choice(implementation: str, platform: str) -> None:
    """Logs a choice the first time it is made; on a CPU, where there is only one, at debug level."""
    level = logging.DEBUG if platform == "cpu" else logging.INFO
    logging.getLogger(__name__).log(level, "attention: '%s' on this %s", implementation, platform.upper())


def load_implementation(implementation: str) -> Callable[..., jax.Array]:
    """The function behind a name. Kernels are imported on demand, because importing Pallas takes a second."""
    module = importlib.import_module(f"dlm_jax.attention.{implementation}")
    return getattr(module, f"attend_{implementation}")


def per_device(function: Callable[..., Any], heads: Sequence[Array], shared: Any, own_tokens: bool = False,
               everywhere: Sequence[Array] = ()) -> Any:
    """`function(*heads, shared, *everywhere)`, where `heads` are arrays [b, n, h, k], as its results are, and `shared`
    is a tree of arrays with a batch axis of b or 1. In a mesh, each device calls it for its own slice of batch and
    heads; with `own_tokens` also for its own tokens, which in `shared` are on the first axis of size n after the batch.

    Heads cross into the mesh as [b, n, h k], as the projections have them: a change of shape that the compiler could
    cancel inside a device is a copy at the border.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if axis_size(*AXES) == 1 or AxisType.Manual in mesh.axis_types:
        return function(*heads, shared, *everywhere)
    if undivided := next((x.shape[2] for x in heads if x.shape[2] % axis_size("tensor")), None):
        raise UserError(f"mesh.tensor {axis_size('tensor')} does not divide the {undivided} key-value heads; choose "
                        "one that does")
    b, n, _, d = heads[0].shape
    batch, tokens = batch_axes(b), "context" if own_tokens else None

    def flat(x: Any) -> jax.Array:
        return x.reshape(*x.shape[:2], -1)

    def split(x: Any) -> jax.Array:
        return x.reshape(*x.shape[:2], -1, d)

    def shared_spec(x: Array) -> PartitionSpec:
        spec: list[MeshAxes] = [batch if x.shape[0] > 1 else None, *[None] * (x.ndim - 1)]
        if n in x.shape[1:]:
            spec[x.shape.index(n, 1)] = tokens
        return PartitionSpec(*spec)

    def on_device(heads: tuple[Any, ...], *rest: Any) -> Any:
        return jax.tree.map(flat, function(*map(split, heads), *rest))

    spec = PartitionSpec(batch, tokens, "tensor")
    specs = ((spec,) * len(heads), jax.tree.map(shared_spec, shared), *[PartitionSpec()] * len(everywhere))
    found = jax.shard_map(on_device, in_specs=specs, out_specs=spec, check_vma=False)(
        tuple(map(flat, heads)), shared, *everywhere)
    return jax.tree.map(split, found)
