"""Several processes as one run: how many there are, how they find each other, and what only one of them does.

With a single process the functions here are no-ops.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping

from dlm_jax.errors import UserError

# Set by `launch/local_processes.py`, and by anything else that starts processes by hand.
COORDINATOR, PROCESSES, PROCESS = "DLM_COORDINATOR", "DLM_PROCESSES", "DLM_PROCESS"


def initialize(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the cluster that the environment describes, if it does. Call this before JAX looks for devices.

    Raises `UserError` where this process cannot join the cluster, or does not find the other hosts.
    """
    import jax
    expected = expected_processes(environment)
    if expected == 1:
        return
    coordinator, process_id = environment.get(COORDINATOR) or None, None
    if coordinator:
        process_id = read_count(environment, PROCESS)
    try:
        jax.distributed.initialize(coordinator, expected if coordinator else None, process_id)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"this process cannot join the other {expected - 1} of its cluster: {first_line(error)}; start "
                        "all of them, and use JAX only after that") from error
    if jax.process_count() == 1:
        raise UserError(f"this process is alone, but the environment describes {expected}; start the command on all "
                        "hosts of the slice")
    print(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of "
          f"{jax.device_count()} devices", file=sys.stderr)


def expected_processes(environment: Mapping[str, str]) -> int:
    """The number of processes that the environment describes (by hand, Slurm, Open MPI, or the hosts of TPU slices), or
    1. Raises `UserError` for a number that cannot be read."""
    if environment.get(COORDINATOR):
        return read_count(environment, PROCESSES)
    if "SLURM_PROCID" in environment:
        return read_count(environment, "SLURM_NTASKS")
    if "OMPI_COMM_WORLD_RANK" in environment:
        return read_count(environment, "OMPI_COMM_WORLD_SIZE")
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = read_count(environment, "MEGASCALE_NUM_SLICES") if environment.get("MEGASCALE_NUM_SLICES") else 1
    return max(1, len(hosts)) * slices


def read_count(environment: Mapping[str, str], name: str) -> int:
    """A variable that must be a whole number. Raises `UserError` where it is not."""
    value = environment.get(name, "")
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} must be a whole number, not {value!r}")
    return int(value)


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return (str(error) or type(error).__name__).splitlines()[0]


def is_primary() -> bool:
    """Whether this process is the one that writes what only one process may write."""
    import jax
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have reached the barrier of this name."""
    import jax
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices(name)


def broadcast_from_primary(value: bool) -> bool:
    """The primary process's `value`, in all processes."""
    import jax
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def all_processes(value: bool) -> bool:
    """Whether `value` is True in all processes."""
    import jax
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils
    return bool(multihost_utils.process_allgather(np.array(value)).all())


@contextlib.contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Runs the block in the primary process before the others; `name` is that of the barrier between."""
    if not is_primary():
        barrier(name)
    yield
    if is_primary():
        barrier(name)
