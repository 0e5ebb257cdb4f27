"""The cross-entropy over several devices is that of one, however batch and tokens are divided among them."""

import json
import os
import subprocess
import sys

import numpy as np

PROGRAM = """
import json
import jax, jax.numpy as jnp, numpy as np
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.objective.sharded_cross_entropy import sharded_cross_entropy
from dlm_jax.parallel.mesh import auto_sharded, make_mesh
from jax.sharding import PartitionSpec

config = ModelConfig(family="llama", vocab_size=24, width=8, depth=1, heads=2, kv_heads=2, head_dim=4, mlp_width=8,
                     max_length=32, rope=Rope(), norm="rms", norm_eps=1e-5, mlp="swiglu", tied_head=False)
random = np.random.default_rng(0)
params = {"head": {"weight": jnp.asarray(random.normal(size=(8, 24)), jnp.float32)}}

def found(shape, b, n):
    hidden = jnp.asarray(random.normal(size=(b, n, 8)), jnp.float32)
    targets, weights = jnp.asarray(random.integers(0, 24, (b, n))), jnp.asarray(random.random((2, b, n)), jnp.float32)
    alone = sharded_cross_entropy(params, hidden, targets, weights, config)
    with jax.set_mesh(make_mesh(*shape)):
        sharded = auto_sharded(lambda *x: sharded_cross_entropy(*x, config), PartitionSpec())
        return [list(map(float, x)) for x in (alone, jax.jit(sharded)(params, hidden, targets, weights))]

shapes, sizes = ((1, 1, 4), (1, 2, 2), (2, 2, 1)), ((4, 8), (3, 8), (4, 7))
print(json.dumps([found(shape, *size) for shape in shapes for size in sizes]))
"""


def test_every_mesh_gives_the_sums_of_one_device_also_where_it_does_not_divide_the_batch():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True,
                          env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "4"})
    assert done.returncode == 0, done.stderr[-3000:]
    for alone, sharded in json.loads(done.stdout):
        np.testing.assert_allclose(sharded, alone, rtol=1e-5)
