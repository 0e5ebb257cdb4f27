"""TPU slices as they are rented: by name, such as `v5p-128`, or by shape, `v5p:4x4x4`; with their links and hosts.

A slice without its wrap-around links does not exist in a data center, and the compiler plans other collectives for it:
over a torus it gathers, over a mesh it sums zero-padded arrays.
"""

import itertools
import math
import re
from typing import Any, NamedTuple

from dlm_jax.errors import UserError


class Generation(NamedTuple):
    """How the slices of a TPU generation are built."""

    axes: int  # of the network
    counted: int  # what the number in a name counts of each chip: its cores, or the chip
    wrapped: int  # links wrap around in slices whose axes are multiples of this
    config: str  # 'megacore': JAX sees the two cores of a chip as one device


GENERATIONS = {"v4": Generation(3, 2, 4, "megacore"), "v5p": Generation(3, 2, 4, "megacore"),
               "tpu7x": Generation(3, 2, 4, "default"), "v5e": Generation(2, 1, 16, "default"),
               "v6e": Generation(2, 1, 16, "default")}
ALIASES = {"v5litepod": "v5e"}
# The slices smaller than a cube of 4 x 4 x 4, and those of two axes, by chips.
SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}
FLAT = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16), 256: (16, 16)}
MAX_CHIPS = 9216


class Slice(NamedTuple):
    """A slice of a generation."""

    generation: str
    shape: tuple[int, ...]  # chips along each axis

    @property
    def topology(self) -> str:
        """Its name for the compiler, such as `v5p:4x4x4`."""
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def wrap(self) -> tuple[bool, ...]:
        """Along which axes the links wrap around. A slice with three axes is a torus or none."""
        of = GENERATIONS[self.generation]
        wraps = [size % of.wrapped == 0 for size in self.shape]
        return (all(wraps),) * 3 if of.axes == 3 else (*wraps, False)

    @property
    def options(self) -> dict[str, Any]:
        """What `jax.experimental.topologies.get_topology_desc` needs to know beyond the name."""
        host = (1, 1, 1) if math.prod(self.shape) == 1 else (2, 2, 1)
        return {"wrap": self.wrap, "chips_per_host_bounds": host,
                "chip_config_name": GENERATIONS[self.generation].config}


def parse_slice(text: str) -> Slice | None:
    """`v5p-128` or `v5p:4x4x4`; None for another text. Raises `UserError` for a name that nobody can rent."""
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d{1,6})|:(\d{1,4}(?:x\d{1,4})+))", text)
    generation = ALIASES.get(match[1], match[1]) if match else ""
    if match is None or generation not in GENERATIONS:
        return None
    if match[3]:
        return Slice(generation, tuple(int(size) for size in match[3].split("x")))
    return Slice(generation, shape_of(generation, int(match[2]), text))


def shape_of(generation: str, number: int, name: str) -> tuple[int, ...]:
    """The shape of the slice with this number in its name: of three axes, the one nearest to a cube."""
    chips, rest = divmod(number, GENERATIONS[generation].counted)
    known = FLAT if GENERATIONS[generation].axes == 2 else SMALL
    if rest == 0 and chips in known:
        return known[chips]
    if rest or known is FLAT or chips % 64 or not 64 <= chips <= MAX_CHIPS:
        sizes = ", ".join(f"{generation}-{size * GENERATIONS[generation].counted}" for size in known)
        raise UserError(f"there is no slice '{name}'; the sizes are {sizes}"
                        + ("" if known is FLAT else f", and multiples of {generation}-128"))
    cubes = chips // 64
    edges = [edge for edge in range(1, cubes + 1) if cubes % edge == 0]
    found = [(a, b, cubes // (a * b)) for a, b in itertools.combinations_with_replacement(edges, 2)
             if cubes % (a * b) == 0 and cubes // (a * b) >= b]
    a, b, c = min(found, key=sum)
    return 4 * a, 4 * b, 4 * c
