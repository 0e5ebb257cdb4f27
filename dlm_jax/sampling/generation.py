"""From requests to canvases, and from traces to samples."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.padding import next_power_of_two
from dlm_jax.models.sharding import mesh_of
from dlm_jax.models.weights import Params
from dlm_jax.parallel.mesh import batch_axes, local_mesh
from dlm_jax.sampling.engine import run
from dlm_jax.sampling.requests import Request, check, check_left_to_right, check_suppressed
from dlm_jax.sampling.sample import BatchCost, Sample, peak_bytes
from dlm_jax.sampling.settings import Settings
from dlm_jax.sampling.trace import Callback, Canvas, Sampler, Trace
from dlm_jax.sampling.unmasking import Jacobi, Speculate, Unmasking, parse_unmasking
from dlm_jax.typing import Int, Key

T = TypeVar("T")
MIN_CANVAS = 64  # the shortest canvas; lengths double from there, so many requests share few compilations


def generate(params: Params, config: ModelConfig, spec: DiffusionSpec, requests: Sequence[Request], settings: Settings,
             numbers: Sequence[int] | None = None, callback: Callback | None = None) -> list[Sample]:
    """Returns one sample per request.

    numbers: request i draws from the key (seed, numbers[i]), by default its index, so its sample does not depend on the
    other requests. callback: called after every step with a `Trace` of numpy arrays; it restricts sampling to one
    device.

    Raises `UserError` for a request that the model cannot serve.
    """
    check_settings(settings, config, spec)
    for request in requests:
        check_request(request, settings, config, spec)
    if not requests:
        return []
    if callback and mesh_of(params):
        raise UserError("a text is watched on one device, and this model is spread over several; leave out tensor "
                        "and fsdp")
    canvas, keys, sampler = prepare(config, spec, requests, settings, numbers, callback)
    mesh = mesh_of(params) or (None if callback else local_mesh(len(canvas.tokens)))
    trace, seconds = run_timed(params, canvas, keys, sampler, config, anonymous(spec), mesh)
    ends = np.asarray(sampler.eos_id).tolist()
    samples = [sample_at(trace, i, request, ends[i]) for i, request in enumerate(requests)]
    cost = BatchCost(int(max(trace.batch_nfe)), sum(sample.new_tokens for sample in samples), seconds, peak_bytes())
    return [dataclasses.replace(sample, cost=cost) for sample in samples]


def prepare(config: ModelConfig, spec: DiffusionSpec, requests: Sequence[Request], settings: Settings,
            numbers: Sequence[int] | None = None, callback: Callback | None = None
            ) -> tuple[Canvas, Key[Array, " b"], Sampler]:
    """What the engine runs for valid requests: canvases, a key for each, and how to fill them. The batch is padded."""
    unmasking, caching = unmasking_for(spec, settings), settings.caching(spec)
    block_size = settings.block_size_for(spec)
    steps, end = steps_and_end(requests, settings.steps, spec)
    canvas = make_canvas(requests, canvas_length(requests, config.max_length, block_size, spec), len(end))
    prompts = 0 if spec.rule == "bidirectional" else prompt_length(requests, block_size, canvas.tokens.shape[1])
    proposal, unmasking = per_sequence((settings.proposal(), unmasking), len(end))
    padded_numbers = np.resize(range(len(requests)) if numbers is None else numbers, len(end))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(settings.seed), padded_numbers)
    return canvas, keys, Sampler(steps, end, proposal, unmasking, caching, block_size, prompts, settings.cfg_scale,
                                 tuple(settings.suppress_tokens), callback)


def check_settings(settings: Settings, config: ModelConfig, spec: DiffusionSpec) -> None:
    """Raises `UserError` for settings that are for other models."""
    unmasking_for(spec, settings)
    settings.caching(spec)
    settings.block_size_for(spec)
    check_suppressed(settings.suppress_tokens, config)


def check_request(request: Request, settings: Settings, config: ModelConfig, spec: DiffusionSpec) -> None:
    """Raises `UserError` if the model cannot serve the request by these settings."""
    check(request, config, spec)
    if isinstance(unmasking_for(spec, settings).selector, Speculate):
        check_left_to_right(request)
        if settings.cfg_scale:
            raise UserError("guidance is for denoising and this text is written left to right; leave out cfg_scale")


def unmasking_for(spec: DiffusionSpec, settings: Settings) -> Unmasking:
    """The unmasking strategy of a model: an autoregressive one can only decode left to right."""
    unmasking = parse_unmasking(settings.unmasking)
    if spec.rule == "causal":
        return unmasking if isinstance(unmasking.selector, Jacobi) else Unmasking(Speculate())
    if isinstance(unmasking.selector, Jacobi):
        raise UserError("the unmasking strategy jacobi is for autoregressive models; choose another strategy")
    if isinstance(unmasking.selector, Speculate) and spec.clean_half != "token_causal":
        raise UserError("the unmasking strategy speculate needs a model whose clean half is token_causal; choose "
                        "another strategy")
    return unmasking


def per_sequence(settings: T, b: int) -> T:
    """`settings` with each number as an array [b, 1]."""
    return jax.tree.map(lambda x: np.full((b, 1), x, np.int32 if isinstance(x, int) else np.float32), settings)


def run_timed(params: Params, canvas: Canvas, keys: Key[Array, " b"], sampler: Sampler, config: ModelConfig,
              spec: DiffusionSpec, mesh: Mesh | None) -> tuple[Trace, float]:
    """The trace of `run` on the host, and the seconds it took without compilation. mesh: see there, or the one that the
    weights are spread over."""
    if mesh is not None and "tensor" in mesh.shape:
        with jax.set_mesh(mesh):
            by_row = NamedSharding(mesh, PartitionSpec(batch_axes(len(canvas.tokens))))
            canvas, keys, sampler = jax.device_put((canvas, keys, sampler), by_row)
            return run_timed_here(params, canvas, keys, sampler, config, spec, None)
    if mesh is not None:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        by_sequence = NamedSharding(mesh, PartitionSpec(*mesh.axis_names))
        canvas, keys, sampler = jax.device_put((canvas, keys, sampler), by_sequence)
    return run_timed_here(params, canvas, keys, sampler, config, spec, mesh)


def run_timed_here(params: Params, canvas: Canvas, keys: Key[Array, " b"], sampler: Sampler, config: ModelConfig,
                   spec: DiffusionSpec, mesh: Mesh | None) -> tuple[Trace, float]:
    """`run_timed` for arguments that lie where they are needed."""
    run.lower(params, canvas, keys, sampler, config=config, spec=spec, mesh=mesh).compile()
    start = time.perf_counter()
    trace = jax.device_get(run(params, canvas, keys, sampler, config=config, spec=spec, mesh=mesh))
    return trace, time.perf_counter() - start


def anonymous(spec: DiffusionSpec) -> DiffusionSpec:
    """The fields of a spec that the engine reads, so that other names or end tokens recompile nothing."""
    return DiffusionSpec(spec.alignment, spec.rule, spec.block_size, spec.mask_token_id, clean_half=spec.clean_half)


def steps_and_end(requests: Sequence[Request], steps: int | None, spec: DiffusionSpec
                  ) -> tuple[Int[Array, " b"], Int[Array, " b"]]:
    """Denoising steps and end token (-1 for none) of each sequence, with b padded to the next power of two."""
    counts = [steps or sum(request.masked) for request in requests]
    ends = [spec.eos_token_id if request.stop and spec.eos_token_id is not None else -1 for request in requests]
    padding = next_power_of_two(len(requests)) - len(requests)
    arrays: Any = np.array([counts + [1] * padding, ends + [-1] * padding], np.int32)
    return arrays[0], arrays[1]


def canvas_length(requests: Sequence[Request], context: int, block_size: int, spec: DiffusionSpec) -> int:
    """Positions of a canvas that has room for the last block of every request: a power of two, or the context."""
    needed = max(last_block_end(request, block_size or 1, spec) for request in requests)
    return min(max(MIN_CANVAS, next_power_of_two(needed)), max(context, needed))


def prompt_length(requests: Sequence[Request], block_size: int, length: int) -> int:
    """Positions that hold every prompt and the block after it, of a canvas of `length`: half of them or all, so that
    few programs are compiled."""
    needed = max(request.masked.index(True) for request in requests) + block_size
    return length // 2 if needed <= length // 2 else length


def last_block_end(request: Request, block_size: int, spec: DiffusionSpec) -> int:
    """One past the last position of the block that holds a request's last token: see `first_blocks`."""
    origin = request.masked.index(True) if spec.rule == "bidirectional" else 0
    return origin + -(-(len(request.tokens) - origin) // block_size) * block_size


def make_canvas(requests: Sequence[Request], n: int, batch: int) -> Canvas:
    """The canvas of `batch` sequences of n positions: the requests, then empty ones."""
    tokens, segments = np.zeros((2, batch, n), np.int32)
    masked = np.zeros(tokens.shape, bool)
    for i, request in enumerate(requests):
        length = len(request.tokens)
        tokens[i, :length], masked[i, :length], segments[i, :length] = request.tokens, request.masked, 1
    arrays: Any = (tokens, masked, segments)  # on the host until they are needed
    return Canvas(*arrays)


def sample_at(trace: Trace, i: int, request: Request, eos_id: int) -> Sample:
    """Sequence i of a finished trace, up to the first end token that the sampler wrote."""
    length = len(request.tokens)
    tokens, commit_step = trace.tokens[i, :length], trace.commit_step[i, :length]
    ends = np.flatnonzero((tokens == eos_id) & (commit_step > 0))
    length = int(ends[0]) + 1 if ends.size else length
    return Sample(tokens[:length].tolist(), commit_step[:length].tolist(), trace.confidence[i, :length].tolist(),
                  int(trace.nfe[i]))
