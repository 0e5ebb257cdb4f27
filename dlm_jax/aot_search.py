"""The fastest way to run a config's step on a topology: how many records at a time, and what is made again."""

import dataclasses
import logging
import typing

from dlm_jax.aot import Report, aot
from dlm_jax.config import Config, Remat
from dlm_jax.mesh import mesh_sizes
from dlm_jax.topology import devices

log = logging.getLogger(__name__)


def search(config: Config, topology: str, slices: int = 1) -> list[Report]:
    """For each `model.remat` the step with the most records at a time (the least `train.accumulate`) that fits, or,
    where none does, the smallest; those that fit first, the least time first. What is learnt depends on neither.

    Raises `UserError` as `aot` does.
    """
    found = [most_at_a_time(with_remat(config, remat), topology, slices) for remat in typing.get_args(Remat)]
    return sorted(found, key=lambda report: (not report.fits, max(report.seconds.values())))


def with_remat(config: Config, remat: Remat) -> Config:
    """The same run with another `model.remat`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def most_at_a_time(config: Config, topology: str, slices: int) -> Report:
    """The report of the least `train.accumulate` that fits, by bisection; memory falls as it grows."""
    cuts = accumulations(config, len(devices(topology, slices)))
    low, high, reports = 0, len(cuts) - 1, {}
    while low not in reports:
        middle = (low + high) // 2
        train = dataclasses.replace(config.train, accumulate=cuts[middle])
        report = reports[middle] = aot(dataclasses.replace(config, train=train), topology, slices)
        log.info("remat %s, accumulate %d: %.2f GiB of %.0f%s", report.remat, report.accumulate, report.peak_gib,
                 report.capacity_gib, "" if report.fits else ", too much")
        low, high = (low, middle) if report.fits else (min(middle + 1, high), high)
    return reports[low]


def accumulations(config: Config, count: int) -> list[int]:
    """Every `train.accumulate` whose parts can be shared out over `count` devices, the least first."""
    replica, fsdp, _ = mesh_sizes(config.mesh.replica, config.mesh.fsdp, config.mesh.tensor, count)
    rows = config.train.batch // (replica * fsdp)
    return [parts for parts in range(1, rows + 1) if rows % parts == 0] or [1]
