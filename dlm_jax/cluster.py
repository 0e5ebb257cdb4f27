"""Several processes as one run: who they are, how they find each other, and what only one of them does."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from dlm_jax.errors import UserError

# The variables that `launch/local_processes.py` sets, and anything else that starts processes by hand.
BY_HAND = ("DLM_COORDINATOR", "DLM_PROCESSES", "DLM_PROCESS")


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Makes this process one of its cluster, where there is one; to be called before JAX looks for devices.

    Raises `UserError` where the environment tells of a cluster that this process cannot join, or of other hosts that it
    does not find.
    """
    import jax
    expected = processes(environment)
    if expected == 1:
        return
    by_hand: dict[str, Any] = {}
    if environment.get(BY_HAND[0]):
        by_hand = dict(coordinator_address=environment[BY_HAND[0]], num_processes=expected,
                       process_id=number(environment, BY_HAND[2]))
    try:
        jax.distributed.initialize(**by_hand)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"this process cannot join the other {expected - 1} of its cluster: {first_line(error)}; start "
                        "all of them, and let nothing use JAX before") from error
    if jax.process_count() == 1:
        raise UserError(f"this process is alone, and the environment tells of {expected}; start the command on all "
                        "hosts of the slice")
    print(f"process {jax.process_index()} of {jax.process_count()}, {jax.local_device_count()} of "
          f"{jax.device_count()} devices", file=sys.stderr)


def processes(environment: Mapping[str, str]) -> int:
    """How many processes the environment tells of: by hand, by Slurm, by Open MPI, or on the hosts of TPU slices."""
    if environment.get(BY_HAND[0]):
        return number(environment, BY_HAND[1])
    if "SLURM_PROCID" in environment or "OMPI_COMM_WORLD_RANK" in environment:
        return number(environment, "SLURM_NTASKS" if "SLURM_PROCID" in environment else "OMPI_COMM_WORLD_SIZE")
    hosts = [host for host in environment.get("TPU_WORKER_HOSTNAMES", "").split(",") if host]
    slices = number(environment, "MEGASCALE_NUM_SLICES") if environment.get("MEGASCALE_NUM_SLICES") else 1
    return max(1, len(hosts)) * slices


def number(environment: Mapping[str, str], name: str) -> int:
    """A variable that must be a whole number."""
    value = environment.get(name, "")
    if not value.isdecimal():
        raise UserError(f"the environment variable {name} must be a whole number, not {value!r}")
    return int(value)


def first_line(error: Exception) -> str:
    """What an error says first."""
    return (str(error) or type(error).__name__).splitlines()[0]


def leads() -> bool:
    """Whether this process is the one that writes what is written once."""
    import jax
    return jax.process_index() == 0


def meet(place: str) -> None:
    """Waits until all processes are at this place of the program."""
    import jax
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices(place)


def agreed(value: bool) -> bool:
    """What the first process says, in all of them."""
    import jax
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils
    return bool(multihost_utils.broadcast_one_to_all(np.array(value)))


def everywhere(value: bool) -> bool:
    """Whether it is so in all processes."""
    import jax
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils
    return bool(multihost_utils.process_allgather(np.array(value)).all())


@contextlib.contextmanager
def leader_first(place: str) -> Iterator[None]:
    """The block runs in the first process before it does in the others."""
    if not leads():
        meet(place)
    yield
    if leads():
        meet(place)
