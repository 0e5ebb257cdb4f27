"""Planning sampling without its devices: the real denoising loop, compiled ahead of time and read."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax.aot.estimate import time_spent
from dlm_jax.aot.program import Event, Loop
from dlm_jax.aot.report import Memory, out_of_memory, read_compiled, shape_of
from dlm_jax.aot.topology import devices, platform_of
from dlm_jax.config import Config
from dlm_jax.errors import UserError
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.sharding import check_tensor, partition_spec
from dlm_jax.models.weights import map_table
from dlm_jax.parallel.device_specs import DeviceSpec, device_spec
from dlm_jax.parallel.mesh import batch_axes, sampling_mesh
from dlm_jax.sampling.engine import run
from dlm_jax.sampling.generation import anonymous, prepare
from dlm_jax.sampling.requests import continuation
from dlm_jax.sampling.settings import Settings
from dlm_jax.training.run import adapted_spec


@dataclasses.dataclass(frozen=True)
class SamplingReport:
    """What the compiler says about denoising a batch, beside a lower bound."""

    topology: str
    devices: int
    tensor: int  # devices that share each weight by heads and columns
    fsdp: int  # devices that share each weight by its width, and gather it
    batch: int  # sequences, over all devices
    length: int  # tokens of each, half of them its prompt
    # Memory of one device in GiB, as in `Report`; arguments are the weights in bf16, temporaries have the cache.
    arguments_gib: float
    temporaries_gib: float
    code_gib: float | None
    peak_gib: float
    capacity_gib: float
    fits: bool
    # Of one denoising step, by the compiler's schedule, on GPUs at least that; None where there is no program.
    seconds_forward: float | None
    least_seconds_forward: float  # reading a device's weights once
    tokens_per_second: float | None  # of the batch, at one token of each sequence per step
    compile_seconds: float


def aot_sampling(config: Config, topology: str, batch: int = 8, length: int = 2048, tensor: int = 1, fsdp: int = 1
                 ) -> SamplingReport:
    """Compiles the denoising loop of the model that `config` trains, weights and cache in bf16, for all devices of a
    `topology`: each `fsdp` x `tensor` of them hold the weights together, as `sampling_mesh` has it.

    Raises `UserError` for an unknown topology, a model or batch that does not divide, and a length beyond its context.
    """
    model, found, started = shape_of(config), devices(topology), time.perf_counter()
    peak = device_spec(found[0].device_kind)
    if peak is None:
        raise UserError(f"the memory of a '{found[0].device_kind}' is not known; choose another generation")
    if not 2 <= length <= model.max_length:
        raise UserError(f"length {length} is not between 2 and the model's context of {model.max_length}")
    check_tensor(model, tensor)
    mesh = sampling_mesh(tensor, fsdp, found)
    spec = adapted_spec(DiffusionSpec(mask_token_id=model.vocab_size - 1), config.recipe, config.model.base)
    requests = [continuation([0] * (length // 2), length - length // 2)] * batch
    arguments = prepare(model, spec, requests, Settings(unmasking="threshold:0.9"))
    params = map_table(model, lambda path, w: jax.ShapeDtypeStruct(
        w.shape, jnp.bfloat16, sharding=NamedSharding(mesh, partition_spec(path, w, mesh.shape))))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        by_row = NamedSharding(mesh, PartitionSpec(batch_axes(len(arguments[0].tokens))))
        arguments = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), x.dtype, sharding=by_row), arguments)
        lowered = run.trace(params, *arguments, config=model, spec=anonymous(spec)).lower(
            lowering_platforms=(platform_of(found[0]),))
        try:
            compiled = lowered.compile()
            memory, text = Memory.of(compiled.memory_analysis()), compiled.as_text()
        except jax.errors.JaxRuntimeError as error:
            memory, text = out_of_memory(error, params), ""
    seconds = seconds_forward(read_compiled(text, found[0], peak), model.depth, peak)
    return SamplingReport(
        topology=topology, devices=len(found), tensor=tensor, fsdp=fsdp, batch=batch, length=length,
        **memory.in_gib(peak.memory), seconds_forward=seconds,
        least_seconds_forward=memory.arguments / peak.bandwidth, tokens_per_second=seconds and batch / seconds,
        compile_seconds=time.perf_counter() - started)


def seconds_forward(program: Sequence[Event | Loop], depth: int, peak: DeviceSpec) -> float | None:
    """Seconds of a denoising step, where there is a program: one trip of the most deeply nested loop that runs through
    all layers. Its attention is no kernel, so the schedule has all of it."""
    steps = sorted(loops_over_layers(program, depth), key=lambda found: found[0])
    if not steps:
        return None
    return sum(time_spent(steps[-1][1].body, peak, lambda name: 0.0)[0].values())


def loops_over_layers(program: Sequence[Event | Loop], depth: int, nesting: int = 0) -> Iterator[tuple[int, Loop]]:
    """The loops of which a trip runs through all layers, which are a loop of `depth` trips, and how nested they are."""
    for loop in program:
        if isinstance(loop, Loop):
            if any(isinstance(inner, Loop) and inner.trips == depth for inner in loop.body):
                yield nesting, loop
            yield from loops_over_layers(loop.body, depth, nesting + 1)
