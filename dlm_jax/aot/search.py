"""The fastest way to run a config's step on a topology: micro-batch size, what the backward pass recomputes, and the
mesh."""

import dataclasses
import logging
import typing
from collections.abc import Iterator

from dlm_jax.aot.report import Report, aot, shape_of
from dlm_jax.aot.topology import devices
from dlm_jax.config import Config, Remat
from dlm_jax.config.fields import MeshConfig
from dlm_jax.parallel.mesh import AXES, count_slices, mesh_sizes

log = logging.getLogger(__name__)


def search(config: Config, topology: str, slices: int = 1) -> list[Report]:
    """For each `model.remat`, the step with the largest micro-batch (the smallest `train.grad_accum_steps`) that fits
    or, where none does, with the smallest; then the same for meshes near the config's with the best of these, as long
    as one is faster. Those that fit come first, the fastest first.

    What the model learns depends on none of these. Offloading is not tried: no estimate counts the host's link.
    Raises `UserError` as `aot` does.
    """
    policies = [remat for remat in typing.get_args(Remat) if remat != "offload_projections"]
    tried = {remat: largest_micro_batch(with_remat(config, remat), topology, slices) for remat in policies}
    best = min(tried, key=lambda remat: cost(tried[remat]))
    reports, config, improved = list(tried.values()), with_remat(config, best), True
    seen = [sizes_of(config, topology, slices)]
    while improved:
        meshes = [mesh for mesh in neighbours(config, topology, slices) if mesh not in seen]
        found = [(largest_micro_batch(with_mesh(config, mesh), topology, slices), mesh) for mesh in meshes]
        improved = bool(found) and min(cost(report) for report, _ in found) < min(map(cost, reports))
        if improved:
            config = with_mesh(config, min(found, key=lambda each: cost(each[0]))[1])
        reports += [report for report, _ in found]
        seen += meshes
    return sorted(reports, key=cost)


def cost(report: Report) -> tuple[bool, float]:
    """What ranks reports: those that fit come first, then the faster ones."""
    return not report.fits, report.seconds_step or max(report.seconds.values())


def with_remat(config: Config, remat: Remat) -> Config:
    """The same run with another `model.remat`."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))


def with_mesh(config: Config, sizes: tuple[int, ...]) -> Config:
    """The same run on a mesh of these sizes, in the order of `AXES`."""
    return dataclasses.replace(config, mesh=MeshConfig(**dict(zip(AXES, sizes))))


def sizes_of(config: Config, topology: str, slices: int) -> tuple[int, ...]:
    """The sizes of a config's mesh, in the order of `AXES`."""
    return tuple(mesh_sizes(**dataclasses.asdict(config.mesh), count=len(devices(topology, slices))))


def neighbours(config: Config, topology: str, slices: int) -> Iterator[tuple[int, ...]]:
    """The meshes in which one axis is half and another twice as large, where these divide the batch, the record, the
    heads, and the slices of a TPU or hosts of GPUs."""
    sizes, hosts = sizes_of(config, topology, slices), count_slices(devices(topology, slices))
    heads, batch = shape_of(config).kv_heads, config.train.global_batch_size
    for smaller in range(len(AXES)):
        for larger in range(len(AXES)):
            mesh = list(sizes)
            mesh[smaller], mesh[larger] = mesh[smaller] // 2, mesh[larger] * 2
            replica, fsdp, context, tensor = mesh
            if (smaller != larger and sizes[smaller] % 2 == 0 and batch % (replica * fsdp) == 0 and replica % hosts == 0
                    and heads % tensor == 0 and config.data.seq_length % context == 0):
                yield tuple(mesh)


def largest_micro_batch(config: Config, topology: str, slices: int) -> Report:
    """The report of the smallest `train.grad_accum_steps` that fits, by bisection: memory falls as it grows."""
    choices = accumulations(config, sizes_of(config, topology, slices))
    low, high, reports = 0, len(choices) - 1, {}
    while low not in reports:
        middle = (low + high) // 2
        train = dataclasses.replace(config.train, grad_accum_steps=choices[middle])
        report = reports[middle] = aot(dataclasses.replace(config, train=train), topology, slices)
        log.info("remat %s, mesh %s, grad_accum_steps %d: %.2f GiB of %.0f%s", report.remat, report.mesh,
                 report.grad_accum_steps, report.peak_gib, report.capacity_gib, "" if report.fits else ", too much")
        low, high = (low, middle) if report.fits else (min(middle + 1, high), high)
    return reports[low]


def accumulations(config: Config, sizes: tuple[int, ...]) -> list[int]:
    """Every `train.grad_accum_steps` whose micro-batches divide over a mesh of these sizes, the smallest first."""
    replica, fsdp, *_ = sizes
    rows = config.train.global_batch_size // (replica * fsdp)
    return [steps for steps in range(1, rows + 1) if rows % steps == 0] or [1]
