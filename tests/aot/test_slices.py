"""TPU slices are those that can be rented."""

import math

import pytest

from dlm_jax.aot.slices import GENERATIONS, parse_slice
from dlm_jax.aot.topology import devices
from dlm_jax.errors import UserError
from dlm_jax.parallel.device_specs import DEVICE_SPECS

# From the tables of Google Cloud's documentation of each generation.
RENTED = {"v4-8": "v4:2x2x1", "v4-64": "v4:2x4x4", "v4-128": "v4:4x4x4", "v4-4096": "v4:8x16x16", "v5p-8": "v5p:2x2x1",
          "v5p-128": "v5p:4x4x4", "v5p-256": "v5p:4x4x8", "v5p-512": "v5p:4x8x8", "v5p-1024": "v5p:8x8x8",
          "v5p-12288": "v5p:16x16x24", "v5e-1": "v5e:1x1", "v5e-8": "v5e:2x4", "v5litepod-16": "v5e:4x4",
          "v5e-256": "v5e:16x16", "v6e-32": "v6e:4x8", "v6e-128": "v6e:8x16", "tpu7x-8": "tpu7x:2x2x1",
          "tpu7x-128": "tpu7x:4x4x4", "tpu7x-1280": "tpu7x:4x8x20", "tpu7x-18432": "tpu7x:16x24x24"}


@pytest.mark.parametrize("name", RENTED)
def test_a_name_says_the_shape(name):
    found = parse_slice(name)
    assert found.topology == RENTED[name] and found == parse_slice(RENTED[name])


@pytest.mark.parametrize("topology, wrap", [("v5p:4x4x4", (True,) * 3), ("v5p:2x4x4", (False,) * 3),
                                            ("tpu7x:8x8x12", (True,) * 3), ("v6e:8x8", (False,) * 3),
                                            ("v6e:8x16", (False, True, False)), ("v5e:16x16", (True, True, False))])
def test_links_wrap_around_in_whole_cubes_and_along_axes_of_sixteen(topology, wrap):
    assert parse_slice(topology).wrap == wrap


@pytest.mark.parametrize("name", ["v5p-7", "v5p-96", "v6e-12", "v5e-512", "v4-0", "tpu7x-999936"])
def test_a_slice_that_nobody_can_rent_is_refused_with_the_sizes(name):
    with pytest.raises(UserError, match=f"there is no slice '{name}'; the sizes are {name.split('-')[0]}-"):
        parse_slice(name)


@pytest.mark.parametrize("text", ["h200:8", "v9:2x2", "v5p", "v5p:", "v5p:4", "v5p-", "2x2", "v5p-1e3", ""])
def test_another_text_is_no_slice(text):
    assert parse_slice(text) is None


@pytest.mark.parametrize("name, slices", [("v5p-128", 1), ("v5p-128", 2), ("v4-8", 1), ("v6e-256", 1), ("tpu7x-8", 1)])
def test_the_compiler_knows_the_devices_of_a_slice_and_we_know_their_peaks(name, slices):
    pytest.importorskip("libtpu")
    found, rented = devices(name, slices), parse_slice(name)
    cores = 2 if rented.generation == "tpu7x" else 1  # of a chip, as devices
    assert len(found) == slices * cores * math.prod(rented.shape)
    assert found[0].device_kind in DEVICE_SPECS


def test_every_generation_is_known():
    assert set(GENERATIONS) == {"v4", "v5e", "v5p", "v6e", "tpu7x"}
