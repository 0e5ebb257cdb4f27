"""Attention on a CPU, in the shapes of the CPU examples of `configs/`: `attend` against the two plain ways in JAX.

    python benchmarks/attention_cpu.py [--repeats 31]

Prints medians in milliseconds, forward and with gradients, and the ratio of `attend` to the better of the other two,
all from one run: `jax.nn.dot_product_attention`, and an einsum over entire rows, each under the rule's dense mask.
"""

import argparse
import functools
import os
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.attention.dispatch import attend
from dlm_jax.attention.plan import Plan, make_plan
from dlm_jax.attention.reference import attend_dense
from dlm_jax.attention.rules import Annealed, BlockDiffusion, Causal, Rule

# Name: (records of a micro-batch, queries, keys, heads, kv_heads, head_dim, rule). Bundled base: 4, 2, 32; stories260k:
# 8, 4, 8; GPT-2 S: 12, 12, 64.
SHAPES: dict[str, tuple[int, int, int, int, int, int, Rule]] = {
    "tiny (bundled base, one stream)": (8, 128, 128, 4, 2, 32, Annealed(0.5, 7)),
    "base (bundled base, causal)": (8, 256, 256, 4, 2, 32, Causal()),
    "tiny_stories_blocks (bundled base)": (8, 256, 256, 4, 2, 32, BlockDiffusion(128, 16)),
    "tiny_stories (stories260k)": (8, 128, 128, 8, 4, 8, Annealed(0.5, 7)),
    "tiny_stories_blocks (stories260k)": (8, 256, 256, 8, 4, 8, BlockDiffusion(128, 16)),
    "next token (GPT-2 S)": (8, 1, 1024, 12, 12, 64, Causal()),
    "next token (stories260k)": (64, 1, 256, 8, 4, 8, Causal()),
}


def documents(rule: Rule, batch: int, rows: int) -> jax.Array:
    """Three packed documents per record, the same in both halves of two streams: int32 [batch, rows]."""
    stream = rule.stream_length(rows)
    segments = np.sort(np.random.default_rng(0).integers(1, 4, (batch, stream)), 1)
    return jnp.asarray(np.tile(segments, (1, rows // stream)), jnp.int32)


def ways(rule: Rule, queries: int, keys: int) -> dict[str, Callable]:
    """Three functions of (q, k, v, segments), q of the last `queries` tokens; each builds its own mask, as steps do."""
    def plan(segments: jax.Array) -> Plan:
        return make_plan(rule, keys, segments, queries, keys - queries)

    def mask(segments: jax.Array) -> jax.Array:
        return plan(segments).visible(jnp.arange(keys))

    return {
        "attend": lambda q, k, v, s: attend(q, k, v, plan(s)),
        "jax.nn": lambda q, k, v, s: jax.nn.dot_product_attention(q, k, v, mask=mask(s)[:, None]),
        "einsum": lambda q, k, v, s: attend_dense(q, k, v, mask(s)),
    }


def calls_of(b: int, n: int, m: int, h: int, g: int, d: int, rule: Rule) -> dict[str, dict[str, Callable]]:
    """For the forward pass and, if all tokens are queries, for the gradients, the call of each way."""
    random = np.random.default_rng(0)
    shapes = ((b, n, h, d), (b, m, g, d), (b, m, g, d))
    arrays = *(jnp.asarray(random.standard_normal(s), jnp.float32) for s in shapes), documents(rule, b, m)
    calls: dict[str, dict[str, Callable]] = {"forward": {}, "gradients": {}}
    for way, function in ways(rule, n, m).items():
        gradients = jax.grad(lambda q, k, v, s, f=function: jnp.sum(f(q, k, v, s) ** 2), (0, 1, 2))
        calls["forward"][way] = functools.partial(jax.jit(function), *arrays)
        calls["gradients"][way] = functools.partial(jax.jit(gradients), *arrays)
    return calls if n == m else {"forward": calls["forward"]}


def medians(calls: dict[str, Callable], repeats: int) -> dict[str, float]:
    """The median milliseconds of each call. The calls alternate, and two warm-up rounds are not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 2):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            if repeat > 1:
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(all_) for name, all_ in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="SHAPE")
    a = parser.parse_args()
    print(f"{'shape':36}{'pass':>10}{'attend':>9}{'jax.nn':>9}{'einsum':>9}{'ratio':>7}   (ms; jax {jax.__version__})")
    for name in a.shapes:
        for what, calls in calls_of(*SHAPES[name]).items():
            ms = medians(calls, a.repeats)
            ratio = ms["attend"] / min(ms["jax.nn"], ms["einsum"])
            print(f"{name:36}{what:>10}" + "".join(f"{ms[way]:9.2f}" for way in calls) + f"{ratio:7.2f}")


if __name__ == "__main__":
    main()
