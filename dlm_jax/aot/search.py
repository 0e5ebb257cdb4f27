"""The fastest way to run a config's step on a topology: micro-batch size, and what the backward pass recomputes."""

import dataclasses
import logging
import typing

from dlm_jax.aot.report import Report, aot
from dlm_jax.aot.topology import devices
from dlm_jax.config import Config, Remat
from dlm_jax.parallel.mesh import mesh_sizes

log = logging.getLogger(__name__)


def search(config: Config, topology: str, slices: int = 1) -> list[Report]:
    """For each `model.remat`, the step with the largest micro-batch (the smallest `train.grad_accum_steps`) that fits
    or, where none does, with the smallest. Those that fit come first, the fastest first.

    What the model learns depends on neither setting. Offloading is not tried: no estimate counts the host's link.
    Raises `UserError` as `aot` does.
    """
    policies = [remat for remat in typing.get_args(Remat) if remat != "offload_projections"]
    found = [largest_micro_batch(with_remat(config, remat), topology, slices) for remat in policies]
    return sorted(found, key=lambda report: (not report.fits, report.seconds_step or max(report.seconds.values())))


def with_remat(config: Config, remat: Remat) -> Config:
    """The same run with another `model.remat`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def largest_micro_batch(config: Config, topology: str, slices: int) -> Report:
    """The report of the smallest `train.grad_accum_steps` that fits, by bisection: memory falls as it grows."""
    choices = accumulations(config, len(devices(topology, slices)))
    low, high, reports = 0, len(choices) - 1, {}
    while low not in reports:
        middle = (low + high) // 2
        train = dataclasses.replace(config.train, grad_accum_steps=choices[middle])
        report = reports[middle] = aot(dataclasses.replace(config, train=train), topology, slices)
        log.info("remat %s, grad_accum_steps %d: %.2f GiB of %.0f%s", report.remat, report.grad_accum_steps,
                 report.peak_gib, report.capacity_gib, "" if report.fits else ", too much")
        low, high = (low, middle) if report.fits else (min(middle + 1, high), high)
    return reports[low]


def accumulations(config: Config, count: int) -> list[int]:
    """Every `train.grad_accum_steps` whose micro-batches divide over `count` devices, the smallest first."""
    replica, fsdp, *_ = mesh_sizes(**dataclasses.asdict(config.mesh), count=count)
    rows = config.train.global_batch_size // (replica * fsdp)
    return [steps for steps in range(1, rows + 1) if rows % steps == 0] or [1]
