"""A checksum depends on every bit and on nothing else: not on the layout, the devices or the processes."""

import json
import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.runs.checksum import SALTS, Damage, check_arrays, checksums, sealed, unsealed


def lowbias32(x: int) -> int:
    """The hash in plain Python."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def by_hand(x: np.ndarray) -> str:
    words = x.reshape(-1).view(f"uint{8 * x.dtype.itemsize}").tolist()
    sums = [sum(lowbias32(word ^ lowbias32(i ^ salt)) for i, word in enumerate(words)) % 2**32 for salt in SALTS]
    return "".join(f"{each:08x}" for each in sums)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint32", "int8"])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4, 5), (0, 2)])
def test_the_sum_is_that_of_the_hashed_words_and_their_row_major_index(dtype, shape):
    x = np.asarray(jnp.asarray(100 * np.random.default_rng(0).normal(size=shape), dtype))
    assert checksums({"a": [x]}) == {"['a'][0]": by_hand(x)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32"])
def test_every_single_bit_counts(dtype):
    x = np.asarray(jnp.asarray(np.random.default_rng(1).normal(size=(2, 3)), dtype))
    found = {checksums(x)[""]}
    for bit in range(8 * x.nbytes):
        flipped = x.copy()
        flipped.reshape(-1).view(np.uint8)[bit // 8] ^= 1 << bit % 8
        found.add(checksums(flipped)[""])
    assert len(found) == 8 * x.nbytes + 1


def test_values_that_trade_places_are_noticed():
    x = jnp.arange(12.0).reshape(3, 4)
    assert len({checksums(y)[""] for y in (x, x[::-1], x[:, ::-1], x.at[0, 0].set(1.0).at[0, 1].set(0.0))}) == 4


def test_the_array_that_differs_is_named():
    tree = {"a": jnp.ones(3), "b": jnp.ones(3)}
    check_arrays(tree, checksums(tree))
    with pytest.raises(Damage, match=r"\['b'\] differs"):
        check_arrays(tree | {"b": -jnp.ones(3)}, checksums(tree))
    with pytest.raises(Damage, match=r"\['c'\] differs"):
        check_arrays(tree | {"c": jnp.ones(3)}, checksums(tree))


ON_EIGHT_DEVICES = """
import json
import jax, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from dlm_jax.parallel.mesh import make_mesh
from dlm_jax.runs.checksum import checksums
x = np.random.default_rng(2).normal(size=(8, 12, 4)).astype("float32")
mesh, found = make_mesh(2, 2, 2), set()
for spec in (P(), P("fsdp"), P(("replica", "fsdp"), "tensor"), P(None, None, "tensor")):
    with jax.set_mesh(mesh):
        found.add(checksums(jax.device_put(x, NamedSharding(mesh, spec)))[""])
    found.add(checksums(jax.device_put(x, NamedSharding(mesh, spec)))[""])
print(json.dumps(sorted(found)))
"""


def test_the_layout_over_devices_does_not_matter():
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    x = np.random.default_rng(2).normal(size=(8, 12, 4)).astype("float32")
    assert json.loads(done.stdout) == [by_hand(x)]


def test_a_sealed_description_cannot_change_unnoticed():
    text = json.dumps(sealed({"step": 4, "model": {"eps": 1e-6, "axes": ("a", "b")}}))
    assert unsealed(text) == {"step": 4, "model": {"eps": 1e-6, "axes": ["a", "b"]}}
    for changed in (text.replace("4", "5", 1), text.replace("1e-06", "1e-07"), '{"step": 4}'):
        with pytest.raises(Damage):
            unsealed(changed)
