"""Planning a run without its devices: the real training step, compiled for a topology of TPUs or GPUs and read."""

import dataclasses
import math
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlm_jax.collectives import collective_bytes
from dlm_jax.config import Config
from dlm_jax.errors import UserError
from dlm_jax.hardware import GIB, Peak, peak_of
from dlm_jax.mesh import AXES, BATCH, make_mesh
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.shapes import SHAPES
from dlm_jax.models.sharding import spec_of
from dlm_jax.models.weights import map_table
from dlm_jax.topology import devices, platform_of
from dlm_jax.training.cost import remade_flops, step_flops
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.step import State, check_shares, make_step


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one step. Memory and collectives are of one device, in GiB; flops (by formula) of
    all; seconds are the least that the arithmetic, the memory or the links would take at their peak, and `bound` says
    which is most."""

    topology: str
    devices: int
    chips: int
    batch: int
    accumulate: int
    remat: str
    arguments_gib: float
    temporaries_gib: float
    code_gib: float | None
    peak_gib: float
    capacity_gib: float
    fits: bool
    collective_gib: dict[str, float]
    flops: float
    seconds: dict[str, float]
    bound: str
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device; code is None where there is no program."""

    arguments: int
    temporaries: int
    code: int | None
    peak: int

    @classmethod
    def of(cls, found: Any) -> "Memory":
        """From the compiler's analysis."""
        parts = found.argument_size_in_bytes, found.temp_size_in_bytes, found.generated_code_size_in_bytes
        return cls(*parts, sum(parts) + found.output_size_in_bytes - found.alias_size_in_bytes)


def shape_of(config: Config) -> ModelConfig:
    """The model that a config trains, with its mask row, without reading weights. Raises `UserError` for a base that is
    neither a directory nor a known one."""
    base = config.model.base
    if base in SHAPES and not Path(base).exists():
        model = SHAPES[base]
    else:
        from dlm_jax.opening import open_bundle
        model = open_bundle(base).config
    # Qwen's tables have spare rows for a mask; the others grow by one.
    spare = model.family in ("qwen2", "qwen3")
    grows = config.recipe.corruption != "none" and config.model.mask == "new" and not spare
    return dataclasses.replace(model, vocab_size=model.vocab_size + grows)


def aot(config: Config, topology: str, slices: int = 1) -> Report:
    """Compiles the training step of `config` for `topology`, such as `v5p:4x4x4` (times `slices`) or `h200:8`.

    On TPUs a step that does not fit has no program, so nothing is known of its code and collectives.
    Raises `UserError` for an unknown topology, a mesh that does not fit it, or without its compiler.
    """
    if config.lora.rank or config.recipe.kl_weight:
        raise UserError("dlm aot plans the training of all weights without a frozen base; set lora.rank and "
                        "recipe.kl_weight to 0")
    model, found, started = shape_of(config), devices(topology, slices), time.perf_counter()
    peak = peak_of(found[0].device_kind)
    if peak is None:
        raise UserError(f"the memory of a '{found[0].device_kind}' is not known; the known kinds are in hardware.py")
    memory, sent = compile_step(config, model, found)
    chips = len({(*getattr(device, "coords", (device.id,)), getattr(device, "slice_index", 0)) for device in found})
    flops, times = roofline(config, model, memory, sent, len(found), peak)
    return Report(
        topology=topology, devices=len(found), chips=chips, batch=config.train.batch,
        accumulate=config.train.accumulate, remat=config.model.remat, arguments_gib=memory.arguments / GIB,
        temporaries_gib=memory.temporaries / GIB, code_gib=memory.code and memory.code / GIB,
        peak_gib=memory.peak / GIB, capacity_gib=peak.memory / GIB,
        fits=memory.code is not None and memory.peak <= peak.memory,
        collective_gib={kind: size / GIB for kind, size in sent.items()}, flops=flops, seconds=times,
        bound=max(times, key=lambda name: times[name]), compile_seconds=time.perf_counter() - started)


def compile_step(config: Config, model: ModelConfig, found: list[Any]) -> tuple[Memory, dict[str, int]]:
    """What a device of `found` needs in memory for the step, and receives in collectives (bytes by kind)."""
    mesh = make_mesh(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor, found)
    if mesh is None:  # the compiler needs the device named
        mesh = Mesh(np.array(found).reshape(1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 3)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        check_shares(config.train)
        state, rows = abstract(config, model, mesh)
        step: Any = make_step(config, model, model.vocab_size - 1)
        lowered = step.trace(state, rows, rows).lower(lowering_platforms=(platform_of(found[0]),))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return out_of_memory(error, (state, rows, rows)), {}
    return Memory.of(compiled.memory_analysis()), collective_bytes(compiled.as_text())


def abstract(config: Config, model: ModelConfig, mesh: jax.sharding.Mesh) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Shapes and layouts of the state (a `State` of them) and of a batch's tokens."""
    sizes = mesh.abstract_mesh.shape
    params = map_table(model, lambda path, w: jax.ShapeDtypeStruct(
        w.shape, jnp.float32, sharding=NamedSharding(mesh, spec_of(path, w, sizes))))
    moments = jax.eval_shape(make_optimizer(config.optimizer, config.train.steps, model).init, params)
    moments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec if x.sharding else PartitionSpec())), moments)
    whole = NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct((config.train.batch, config.data.length), jnp.int32,
                                sharding=NamedSharding(mesh, PartitionSpec(BATCH)))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    skipped: Any = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=whole)
    return State(step, params, moments, skipped), rows


def out_of_memory(error: Exception, arguments: Any) -> Memory:
    """What the compiler says of the memory of a step that does not fit. Raises any other error again."""
    said = re.search(r"(temporaries \(|Used )([\d.]+)([GM])", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or said is None or "vmem" in str(error):
        raise error
    own = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(arguments))
    stated = int(float(said[2]) * (GIB if said[3] == "G" else 2**20))
    temporaries = stated - own if said[1] == "Used " else stated
    return Memory(own, temporaries, None, own + temporaries)


def roofline(config: Config, model: ModelConfig, memory: Memory, sent: dict[str, int], count: int,
             peak: Peak) -> tuple[float, dict[str, float]]:
    """Operations of a step, and the least seconds it takes on `count` devices by what it computes (here with what it
    makes again), moves in memory and sends."""
    run = model, config.recipe, config.train.batch, config.data.length
    flops, done = step_flops(*run), step_flops(*run) + remade_flops(*run, config.model.remat)
    # The state is read and written; the temporaries at least once each.
    moved = 2 * (memory.arguments + memory.temporaries)
    return flops, {"arithmetic": done / count / peak.flops, "memory": moved / peak.bandwidth,
                   "links": sum(sent.values()) / peak.links}
