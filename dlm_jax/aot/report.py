"""Planning a run without its devices: the real training step, compiled ahead of time and read."""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dlm_jax.aot.estimate import TILE_CYCLES, estimate
from dlm_jax.aot.gpu_program import read_gpu_program
from dlm_jax.aot.hlo import collective_bytes
from dlm_jax.aot.program import Event, Loop, read_program
from dlm_jax.aot.timeline import pace_of, page
from dlm_jax.aot.topology import devices, platform_of
from dlm_jax.config import Config
from dlm_jax.errors import UserError
from dlm_jax.files import write_text
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.shapes import SHAPES
from dlm_jax.models.sharding import partition_spec
from dlm_jax.models.weights import map_table
from dlm_jax.parallel.device_specs import GIB, DeviceSpec, device_spec
from dlm_jax.parallel.mesh import AXES, BATCH_AXES, check_slices, make_mesh, mesh_sizes
from dlm_jax.training.flops import recompute_flops, step_flops
from dlm_jax.training.optimizer import make_optimizer
from dlm_jax.training.step import TrainState, check_mesh_divides, make_step


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says about one training step, beside a roofline."""

    topology: str
    devices: int
    chips: int
    global_batch_size: int
    grad_accum_steps: int
    remat: str
    mesh: str  # such as 'replica=2 fsdp=32'
    # Memory of one device in GiB: arguments (state and batch), temporaries, program code (None where the step does not
    # fit, since there is no program then), the peak, and what the device has.
    arguments_gib: float
    temporaries_gib: float
    code_gib: float | None
    peak_gib: float
    capacity_gib: float
    fits: bool
    collective_gib: dict[str, float]  # received by one device, by kind of collective
    flops: float  # of the full step on all devices, by formula
    seconds: dict[str, float]  # lower bounds at peak: compute, memory, interconnect
    bottleneck: str  # the largest of them
    # The fields of an `Estimate`.
    seconds_step: float | None
    spent: dict[str, float] | None
    mfu: float | None
    copies_share: float | None
    hidden_share: float | None
    compile_seconds: float


@dataclasses.dataclass(frozen=True)
class Memory:
    """Memory of one device in bytes; code is None where there is no program."""

    arguments: int
    temporaries: int
    code: int | None
    peak: int

    @classmethod
    def of(cls, stats: Any) -> "Memory":
        """From XLA's `CompiledMemoryStats`."""
        parts = stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.generated_code_size_in_bytes
        return cls(*parts, sum(parts) + stats.output_size_in_bytes - stats.alias_size_in_bytes)

    def in_gib(self, capacity: float) -> dict[str, Any]:
        """The fields that reports have of it, on a device of `capacity` bytes."""
        return {"arguments_gib": self.arguments / GIB, "temporaries_gib": self.temporaries / GIB,
                "code_gib": self.code and self.code / GIB, "peak_gib": self.peak / GIB, "capacity_gib": capacity / GIB,
                "fits": self.code is not None and self.peak <= capacity}


def shape_of(config: Config) -> ModelConfig:
    """The shape of the model that a config trains, with its mask row, without reading weights where the base is known.

    Raises `UserError` for a base that is neither a directory nor a known one.
    """
    base = config.model.base
    if base in SHAPES and not Path(base).exists():
        model = SHAPES[base]
    else:
        from dlm_jax.loading import load_bundle
        model = load_bundle(base).config
    # Qwen's embedding tables have spare rows for a mask token; the others grow by one row.
    spare = model.family in ("qwen2", "qwen3")
    grows = config.recipe.masks and config.model.mask == "new" and not spare
    return dataclasses.replace(model, vocab_size=model.vocab_size + grows)


def aot(config: Config, topology: str, slices: int = 1, timeline: str | Path | None = None) -> Report:
    """Compiles the training step of `config` for `topology`, such as `v5p:4x4x4` (times `slices`) or `h200:8`.

    timeline: a page to write, with what a layer's time goes into.
    On TPUs a step that does not fit has no program, so its code size and collectives are unknown. Raises `UserError`
    for an unknown topology, a mesh that does not fit it, or where its compiler is not installed.
    """
    if config.lora.rank or config.recipe.kl_weight:
        raise UserError("dlm aot plans the training of all weights without a frozen base; set lora.rank and "
                        "recipe.kl_weight to 0")
    model, found, started = shape_of(config), devices(topology, slices), time.perf_counter()
    kind = found[0].device_kind
    peak = device_spec(kind)
    if peak is None:
        raise UserError(f"the memory of a '{kind}' is not known; choose another generation")
    if timeline is not None:
        check_timeline(Path(timeline))
    memory, text = compile_step(config, model, found)
    sent, program = collective_bytes(text), read_compiled(text, found[0], peak)
    chips = len({(*getattr(device, "coords", (device.id,)), getattr(device, "slice_index", 0)) for device in found})
    flops, times = roofline(config, model, memory, sent, len(found), peak)
    report = Report(
        topology=topology, devices=len(found), chips=chips, global_batch_size=config.train.global_batch_size,
        grad_accum_steps=config.train.grad_accum_steps, remat=config.model.remat, mesh=mesh_text(config, len(found)),
        **memory.in_gib(peak.memory),
        collective_gib={kind: size / GIB for kind, size in sent.items()}, flops=flops, seconds=times,
        bottleneck=max(times, key=lambda name: times[name]),
        **estimate(program, flops, config, model, len(found), kind, peak)._asdict(),
        compile_seconds=time.perf_counter() - started)
    if timeline is not None:
        write_timeline(Path(timeline), program, report, config, model, kind)
    return report


def mesh_text(config: Config, count: int) -> str:
    """The axes of the mesh on `count` devices that are longer than 1; 'fsdp=1' on one device."""
    sizes = dict(zip(AXES, mesh_sizes(**dataclasses.asdict(config.mesh), count=count)))
    return " ".join(f"{axis}={size}" for axis, size in sizes.items() if size > 1) or "fsdp=1"


def check_timeline(file: Path) -> None:
    """Raises `UserError` where no timeline can be written to `file`."""
    if not file.parent.is_dir() or file.is_dir():
        raise UserError(f"cannot write {file}; name a file in a directory that exists")


def write_timeline(file: Path, program: Sequence[Event | Loop], report: Report, config: Config, model: ModelConfig,
                   kind: str) -> None:
    """Writes the page of `timeline.py`. Raises `UserError` if the step does not fit and so has no program."""
    if report.seconds_step is None:
        raise UserError(f"the step needs {report.peak_gib:.1f} GiB of {report.capacity_gib:.0f}, so there is no "
                        "program to draw; leave out the timeline to see its memory")
    title = f"{config.model.base}, {config.recipe.name}, on {report.topology}"
    takes = (f"{report.seconds_step:.3g} s by the compiler's estimates, at" if kind in TILE_CYCLES else
             f"at least {report.seconds_step:.3g} s, with everything at the GPU's peak, at most")
    batches = f"{report.grad_accum_steps} micro-batch{'es' if report.grad_accum_steps > 1 else ''}"
    summary = (f"A step takes {takes} {report.mfu:.0%} of the peak in useful operations (MFU). "
               f"{report.global_batch_size} records of {config.data.seq_length} tokens on {report.devices} devices, "
               f"{batches}, remat {report.remat}.")
    write_text(file, page(title, summary, program, pace_of(config, model, report.devices, kind)))


def compile_step(config: Config, model: ModelConfig, found: list[Any]) -> tuple[Memory, str]:
    """Compiles the step for the devices `found`: memory of one device, and the program's text; none where it does not
    fit."""
    mesh = make_mesh(**dataclasses.asdict(config.mesh), devices=found)
    if mesh is None:  # a single device: name it for the compiler
        mesh = Mesh(np.array(found).reshape(1, 1, 1, 1), AXES, axis_types=(AxisType.Explicit,) * 4)
    if platform_of(found[0]) == "cuda":  # whose descriptions have no slices
        check_slices(mesh.shape["replica"], len({device.process_index for device in found}))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        check_mesh_divides(config)
        state, rows = abstract_arguments(config, model, mesh)
        step: Any = make_step(config, model, model.vocab_size - 1)
        lowered = step.trace(state, rows, rows).lower(lowering_platforms=(platform_of(found[0]),))
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            return out_of_memory(error, (state, rows, rows)), ""
    return Memory.of(compiled.memory_analysis()), compiled.as_text()


def read_compiled(text: str, device: Any, peak: DeviceSpec) -> tuple[Event | Loop, ...]:
    """The operations of a program that was compiled for such a device, from its text; none of an empty one."""
    if not text:
        return ()
    return read_gpu_program(text, peak) if platform_of(device) == "cuda" else read_program(text)


def abstract_arguments(config: Config, model: ModelConfig,
                       mesh: jax.sharding.Mesh) -> tuple[TrainState, jax.ShapeDtypeStruct]:
    """Shapes and shardings of the state (in a `TrainState`) and of a batch's tokens."""
    sizes = mesh.abstract_mesh.shape
    params = map_table(model, lambda path, w: jax.ShapeDtypeStruct(
        w.shape, jnp.float32, sharding=NamedSharding(mesh, partition_spec(path, w, sizes))))
    moments = jax.eval_shape(make_optimizer(config.optimizer, config.train.steps, model).init, params)
    moments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec if x.sharding else PartitionSpec())), moments)
    replicated = NamedSharding(mesh, PartitionSpec())
    rows = jax.ShapeDtypeStruct((config.train.global_batch_size, config.data.seq_length), jnp.int32,
                                sharding=NamedSharding(mesh, PartitionSpec(BATCH_AXES)))
    step: Any = jax.ShapeDtypeStruct((), jnp.int32, sharding=replicated)
    skipped: Any = jax.ShapeDtypeStruct((2,), jnp.int32, sharding=replicated)
    return TrainState(step, params, moments, skipped), rows


def out_of_memory(error: Exception, arguments: Any) -> Memory:
    """The memory of a step that does not fit, from the compiler's message. Re-raises any other error."""
    message = re.search(r"(temporaries \(|Used )([\d.]+)([GM])", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or message is None or "vmem" in str(error):
        raise error
    shards = ((x.sharding.shard_shape(x.shape), x.dtype) for x in jax.tree.leaves(arguments))
    argument_bytes = sum(math.prod(shape) * dtype.itemsize for shape, dtype in shards)
    stated = int(float(message[2]) * (GIB if message[3] == "G" else 2**20))
    temporaries = stated - argument_bytes if message[1] == "Used " else stated
    return Memory(argument_bytes, temporaries, None, argument_bytes + temporaries)


def roofline(config: Config, model: ModelConfig, memory: Memory, sent: dict[str, int], count: int,
             peak: DeviceSpec) -> tuple[float, dict[str, float]]:
    """FLOPs of a step, and lower bounds in seconds on `count` devices: what it computes (with what the backward pass
    recomputes), moves in memory, and sends."""
    shape = model, config.recipe, config.train.global_batch_size, config.data.seq_length
    flops, computed = step_flops(*shape), step_flops(*shape) + recompute_flops(*shape, config.model.remat)
    # State and temporaries are each read and written at least once.
    moved = 2 * (memory.arguments + memory.temporaries)
    return flops, {"compute": computed / count / peak.flops, "memory": moved / peak.bandwidth,
                   "interconnect": sum(sent.values()) / peak.interconnect_bandwidth}
