"""The time of a training step, estimated: the compiler's schedule, our kernels by theirs, and what the core waits for.

Of GPUs the compiler says only the order, so there everything counts at the chip's peak: see `gpu_program.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp

from dlm_jax.aot.program import Event, Loop
from dlm_jax.aot.schedule import schedule_of
from dlm_jax.attention.plan import make_plan
from dlm_jax.attention.tiles import TILE
from dlm_jax.attention.visibility import training_rule
from dlm_jax.config import Config
from dlm_jax.models.config import ModelConfig
from dlm_jax.parallel.device_specs import DeviceSpec

# Cycles of our kernels, forward and backward, for a full tile of 512 queries x 1,024 keys with heads of 128, on one
# core: the larger of the bundles and the matrix unit's bound (docs/performance.md, attention on TPUs).
TILE_CYCLES = {"TPU v4": (2048, 5120), "TPU v5 lite": (2048, 5120), "TPU v5": (2048, 5120),
               "TPU v6 lite": (1524, 2471), "TPU7x": (1508, 2312)}
CORES = {"TPU v4": 2, "TPU v5": 2}  # of a device; 1 for the others
# Of our kernels on GPUs, products of matrices for each pair of a query and a key.
GPU_PRODUCTS = {"forward_kernel": 2, "d_queries_kernel": 3, "d_keys_kernel": 4}


class Estimate(NamedTuple):
    """What the compiler's schedule says about a step; None where there is no program. On GPUs the seconds are at least
    those and the MFU at most that."""

    seconds_step: float | None = None
    spent: dict[str, float] | None = None  # those seconds: products, kernels, copies, other, waiting
    mfu: float | None = None
    copies_share: float | None = None  # of the seconds
    hidden_share: float | None = None  # of the bytes of collectives: those that travel behind work


def estimate(program: Sequence[Event | Loop], flops: float, config: Config, model: ModelConfig, count: int, kind: str,
             peak: DeviceSpec) -> Estimate:
    """The estimate for a step of so many `flops` on `count` devices of a kind, from its program."""
    if not program:
        return Estimate()
    run = kernel_run(config, model, count, kind, peak)
    spent, hidden = time_spent(program, peak, lambda name: kernel_seconds(run, name))
    seconds = sum(spent.values())
    return Estimate(seconds, spent, flops / count / peak.flops / seconds, spent["copies"] / seconds, hidden)


def time_spent(program: Sequence[Event | Loop], peak: DeviceSpec, kernel: Callable[[str], float]
               ) -> tuple[dict[str, float], float]:
    """(seconds of products, copies, other, kernels and waiting, share of the collectives' bytes behind work) of a
    program; kernel(name): seconds of one run of that kernel."""
    schedule = schedule_of(program)
    waiting, hidden = schedule.waiting(peak.interconnect_bandwidth, peak.clock)
    spent = {name: schedule.cycles[name] / peak.clock for name in ("products", "copies", "other")}
    kernels = sum(runs * kernel(name) for name, runs in schedule.kernels.items())
    return spent | {"kernels": kernels, "waiting": waiting}, hidden


def kernel_seconds(run: Mapping[str, float], name: str) -> float:
    """Seconds of one call of a kernel. The pieces of a backward pass, such as `attention_backward_1_of_4`, share those
    of a whole one."""
    kernel, _, pieces = name.partition("_of_")
    return run[kernel.rstrip("_0123456789")] / int(pieces or 1)


def kernel_run(config: Config, model: ModelConfig, count: int, kind: str, peak: DeviceSpec) -> dict[str, float]:
    """Seconds of each kernel, by its name, in one layer of one micro-batch: attention by its tiles, and what is
    made of queries and keys before by what is read and written, since that takes longer than the instructions (on
    v5p they take up to a tenth longer). On GPUs by the products alone."""
    records = config.train.global_batch_size / config.train.grad_accum_steps * (2 if config.recipe.complementary else 1)
    pairs = computed_pairs(config) * records / count * model.heads * model.head_dim  # each with a number of a head
    if kind not in TILE_CYCLES:
        return {name: number * 2 * pairs / peak.flops for name, number in GPU_PRODUCTS.items()}
    tiles = pairs / 128 / (512 * 1024)
    forward, backward = (tiles * cycles / CORES.get(kind, 1) / peak.clock for cycles in TILE_CYCLES[kind])
    values = records / count * config.recipe.streams * config.data.seq_length * (
        model.heads + model.kv_heads) * model.head_dim
    moved = 2 * values * jnp.dtype(config.model.dtype).itemsize
    once = moved / peak.bandwidth  # each of q and k read and written
    return {"attention_forward": forward, "attention_backward": backward, "rotate": once, "norm_and_rotate": once,
            "norm_and_rotate_backward": 1.5 * once}


def computed_pairs(config: Config) -> int:
    """(query, key) pairs in the tiles that are visited for one record that is a single document."""
    length = config.data.seq_length
    tiles = make_plan(training_rule(config.recipe, length), config.recipe.streams * length).tiles
    assert tiles is not None
    return int((tiles[..., 3] - tiles[..., 0]).sum()) * TILE * TILE
