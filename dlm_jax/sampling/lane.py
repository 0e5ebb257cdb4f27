"""A lane: rows that decode alike, and the requests that hold them (`rows.py` is their device's side)."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.padding import next_power_of_two
from dlm_jax.models.sharding import in_mesh_of, mesh_of
from dlm_jax.models.weights import Params
from dlm_jax.sampling.generation import (
    anonymous,
    canvas_length,
    check_request,
    last_block_end,
    make_canvas,
    per_sequence,
    sample_at,
    steps_and_end,
    unmasking_for,
)
from dlm_jax.sampling.requests import Request, continuation
from dlm_jax.sampling.rows import Newcomer, Rows, admit, advance_rows, is_cache, left_to_right, new_rows, release
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.settings import Settings
from dlm_jax.sampling.trace import Sampler, Trace

MIN_PASS = 64  # positions of the shortest pass that reads a prompt; lengths double from there
NOTHING = -1  # where a row knows no token


class LaneKey(NamedTuple):
    """What one compiled program can serve: `tree` holds all of a `Sampler` but its numbers."""

    tree: jax.tree_util.PyTreeDef
    length: int  # positions of the canvas


class Progress(NamedTuple):
    """How far a request has come."""

    trace: Trace  # of the batch, on the host
    row: int
    settled: int  # the positions before this one will not change any more
    sample: Sample | None  # once it is finished


@dataclasses.dataclass(eq=False)
class Job:
    """A request on its way."""

    request: Request
    settings: Settings
    number: int  # of its random stream, as in `generate`
    listener: Callable[["Job", "Progress | None"], None]  # None: it failed
    every_round: bool = True  # whether the listener is called after every round, or only at the end
    every_pass: bool = False  # whether a round is one pass, so that the listener sees each denoising step
    cancelled: bool = False  # set by anyone: the row is freed after the round

    @property
    def prompt(self) -> list[int]:
        """The tokens before the first hole."""
        return self.request.tokens[:self.request.masked.index(True)]


class Lane:
    """Rows that decode alike."""

    def __init__(self, params: Params, config: ModelConfig, spec: DiffusionSpec, example: Job, length: int,
                 size: int) -> None:
        self.params, self.spec, self.length = params, spec, length
        self.static = {"config": config, "spec": anonymous(spec)}  # what the programs are compiled for
        sampler = sampler_of(example, spec)
        self.block_size = sampler.block_size or length
        self.left_to_right, self.reads = left_to_right(sampler), sampler.caching.recompute != "canvas"
        self.size = size
        self.jobs: list[Job | None] = [None] * size
        self.known = np.full((size, length), NOTHING)  # the prompt whose keys and values each row holds
        self.read_tokens = 0  # of prompts that were read, not copied
        with in_mesh_of(params):
            self.keep(new_rows(params, make_canvas([], length, size), jax.random.split(jax.random.key(0), size),
                               jax.tree.map(lambda x: np.repeat(x, size, 0), sampler), **self.static))

    def keep(self, rows: Rows) -> None:
        """Holds the rows. Where devices share the weights, each has its own heads of the caches, and all else: left to
        the compiler, the layout may change from program to program, and each would be compiled for each."""
        mesh = mesh_of(self.params)

        def lay_out(x: Any) -> Any:
            assert mesh is not None
            spec = PartitionSpec(None, None, None, "tensor") if is_cache(x) else PartitionSpec()
            return jax.device_put(x, NamedSharding(mesh, spec))

        self.rows = rows if mesh is None else jax.tree.map(lay_out, rows, is_leaf=is_cache)

    @property
    def free(self) -> list[int]:
        """The rows that no job holds."""
        return [row for row, job in enumerate(self.jobs) if job is None]

    @property
    def busy(self) -> int:
        """How many rows are held."""
        return self.size - len(self.free)

    def examples(self, job: Job) -> list[Job]:
        """The shortest jobs like `job` that together need every program of the lane: for prompts of each length."""
        unit = 1 if self.left_to_right else self.block_size
        doublings = next_power_of_two(-(-self.length // MIN_PASS)).bit_length() if self.reads else 1
        ends = [min(MIN_PASS << i, self.length) if self.reads else self.length for i in range(doublings)]
        return [dataclasses.replace(job, request=continuation([i] * max(end - unit, 1), 1))
                for i, end in enumerate(ends)]

    def admit(self, job: Job) -> None:
        """Gives a free row to a job and reads its prompt. The row that remembers its prompt best is not overwritten if
        another is free."""
        prompt, lengths = job.prompt, np.sum(self.known != NOTHING, 1)
        starts = common_starts(prompt, self.known)
        source = int(np.argmax(starts))
        row = min(self.free, key=lambda i: (i == source and starts[i] < lengths[i], lengths[i]))
        first, length = self.span(len(prompt), int(starts[source]))
        new = Newcomer(make_canvas([job.request], self.length, 1), sampler_of(job, self.spec),
                       np.uint32(job.settings.seed), np.uint32(job.number), np.int32(row), np.int32(source),
                       np.int32(first))
        with in_mesh_of(self.params):
            self.keep(admit(self.params, self.rows, new, length=length, **self.static))
        self.jobs[row], self.known[row] = job, NOTHING
        if self.reads:
            self.known[row, :len(prompt)] = prompt
        self.read_tokens += max(len(prompt) - first, 0)

    def span(self, prompt: int, known: int) -> tuple[int, int]:
        """From which position a prompt is read of whose beginning so many tokens are known, and over how many."""
        if not self.reads:
            return 0, self.length
        # Its last token is always read, since that predicts the next; a block-causal model knows whole blocks.
        unit = 1 if self.left_to_right else self.block_size
        first = max(min(known, prompt - 1), 0) // unit * unit
        end = prompt if self.left_to_right else prompt // unit * unit + unit
        length = min(max(MIN_PASS, next_power_of_two(end - first)), self.length)
        return min(first, self.length - length), length

    def advance(self, passes: int) -> int:
        """Runs a round of at most so many forward passes, tells the jobs, and frees the rows of finished ones. Returns
        how many passes it ran."""
        with in_mesh_of(self.params):
            rows, done = advance_rows(self.params, self.rows, np.int32(passes), **self.static)
        self.keep(rows)
        trace, ends, done = jax.device_get((self.rows.state.trace, self.rows.sampler.eos_id, done))
        all_finished = ~trace.masked.any(1)
        for row, job in enumerate(self.jobs):
            if job is not None:
                finished = bool(all_finished[row])
                sample = sample_at(trace, row, job.request, int(ends[row])) if finished else None
                if not job.cancelled and (finished or job.every_round):
                    job.listener(job, Progress(trace, row, self.settled(job, trace.masked[row]), sample))
                if job.cancelled and not finished:
                    self.keep(release(self.rows, np.int32(row)))
                if job.cancelled or finished:
                    self.jobs[row] = None
        return int(done)

    def settled(self, job: Job, masked: np.ndarray) -> int:
        """The positions before this one will not change any more: whole blocks, or what is written left to right."""
        n, prompt = len(job.request.tokens), len(job.prompt)
        first = int(masked.argmax()) if masked.any() else n
        if self.left_to_right:
            return first
        origin = prompt if self.spec.rule == "bidirectional" else 0
        return max(origin + (first - origin) // self.block_size * self.block_size, prompt) if first < n else n


def sampler_of(job: Job, spec: DiffusionSpec) -> Sampler:
    """How a job is decoded, for a batch of one. Raises `UserError` if the model cannot serve it."""
    settings = job.settings
    unmasking, caching = unmasking_for(spec, settings), settings.caching(spec)
    if caching.recompute == "suffix" or (caching.recompute == "block" and not caching.recompute_clean):
        raise UserError(f"requests that start at different times cannot share the cache '{settings.cache}'; leave out "
                        "cache")
    steps, end = steps_and_end([job.request], settings.steps, spec)
    proposal, unmasking = per_sequence((settings.proposal(), unmasking), 1)
    return Sampler(steps, end, proposal, unmasking, caching, settings.block_size_for(spec), 0, settings.cfg_scale,
                   tuple(settings.suppress_tokens))


def lane_key(job: Job, config: ModelConfig, spec: DiffusionSpec, context: int) -> LaneKey:
    """The lane that serves a job. Raises `UserError` if none can.

    A model without a cache computes the whole canvas at each pass, so its lanes differ in length. context: the most
    positions of a canvas.
    """
    check_request(job.request, job.settings, config, spec)
    sampler = sampler_of(job, spec)
    needed = last_block_end(job.request, sampler.block_size or 1, spec)
    if needed > context:
        raise UserError(f"the text takes {needed} positions and this server has {context}; shorten it or ask for fewer "
                        "tokens")
    whole = sampler.caching.recompute == "canvas"
    length = canvas_length([job.request], context, sampler.block_size, spec) if whole else context
    return LaneKey(jax.tree.structure(sampler), length)


def common_starts(prompt: Sequence[int], known: np.ndarray) -> np.ndarray:
    """How many tokens a prompt has in common, from its start, with each row of `known`, where `NOTHING` is no token."""
    here = np.full(known.shape[1], NOTHING - 1)
    here[:len(prompt)] = prompt
    return np.sum(np.cumprod(known == here, 1), 1)
