"""The backward pass of a layer computes again what the policy says, and no more."""

import functools
import typing

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from dlm_jax.attention.cpu import attend_cpu
from dlm_jax.attention.plan import make_plan
from dlm_jax.attention.reference import attend_reference
from dlm_jax.attention.rules import Causal
from dlm_jax.attention.tpu import Chip, attend_tpu
from dlm_jax.config import Remat
from dlm_jax.models.remat import PRODUCTS, recomputed, remat_layer
from dlm_jax.models.transformer import layer

N = 6
WEIGHTS = 7  # of a layer with SwiGLU
TPU = functools.partial(attend_tpu, chip=Chip(16 << 20, 128), interpret=True)


def equations(jaxpr: Jaxpr) -> typing.Iterator[JaxprEqn]:
    """All equations, with those of the functions that are called, but not inside kernels."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, (ClosedJaxpr, Jaxpr))):
            if isinstance(value, (ClosedJaxpr, Jaxpr)) and eqn.primitive.name != "pallas_call":
                yield from equations(value.jaxpr if isinstance(value, ClosedJaxpr) else value)


def gradient_of_a_layer(random_model, remat, attend, family="qwen2"):
    """The equations of its gradient, for its input and its weights."""
    config, params = random_model(family, qkv_bias=False)
    weights, plan = jax.tree.map(lambda w: w[0], params["layers"]), make_plan(Causal(), N)

    def body(x, w):
        return layer(x, w, jnp.arange(N)[None], config, lambda q, k, v: (attend(q, k, v, plan=plan), None))[0]

    def loss(x, w):
        return jnp.sum(jnp.sin(remat_layer(body, remat, config.qk_norm)(x, w)))

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(jnp.ones((1, N, config.width)), weights).jaxpr
    return list(equations(jaxpr))


@pytest.mark.parametrize("attend", [attend_reference, attend_cpu, TPU], ids=["reference", "cpu", "tpu"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("remat", typing.get_args(Remat))
def test_a_policy_repeats_the_products_that_it_does_not_keep(random_model, remat, attend, family):
    found = gradient_of_a_layer(random_model, remat, attend, family)
    products = [eqn for eqn in found if eqn.primitive.name == "dot_general" and eqn.invars[0].aval.ndim == 2]
    repeated = sum(len(PRODUCTS[name]) for name in recomputed(remat))
    assert len(products) == 3 * WEIGHTS + repeated  # each weight forward, and for the gradients of both operands


@pytest.mark.parametrize("remat", typing.get_args(Remat))
def test_the_attention_kernel_runs_again_only_where_its_output_is_not_kept(random_model, remat):
    found = gradient_of_a_layer(random_model, remat, TPU)
    used = {id(x) for eqn in found for x in eqn.invars}  # XLA drops a kernel that nothing uses, jax does not
    kernels = [eqn for eqn in found if eqn.primitive.name == "pallas_call" and any(id(x) in used for x in eqn.outvars)]
    assert len(kernels) == 2 + ("attention" in recomputed(remat))


def test_offloaded_activations_wait_in_the_memory_of_the_host(random_model):
    moved = [eqn for eqn in gradient_of_a_layer(random_model, "offload_projections", attend_cpu)
             if eqn.primitive.name == "device_put"]
    assert len(moved) == 2 * 7  # q, k, v, attention, its projection, gate and up: there and back
