"""Attention on a Hopper GPU: ours against PyTorch FlexAttention, cuDNN (causal only) and dense attention with a mask.

    python benchmarks/attention_gpu.py [--repeats 9]

Rates count useful work only: 4 head_dim heads floating-point operations per visible (query, key) pair forward, and 10
head_dim heads more backward, whatever else a kernel computes. All implementations run in one process on the same
shapes, in bfloat16 with heads of 128; each figure is the median of several groups of calls. FlexAttention is compiled
and its block mask built in advance; dense attention gets its keys and values repeated in advance. cuDNN does not
support these masks: for two streams it runs causal attention at half the length and twice the batch, which has as many
visible pairs within a few percent. Our output and gradients are first compared with the reference. Without a GPU the
benchmark reports that and stops.
"""

import os

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory too

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.attention.gpu import attend_gpu
from dlm_jax.attention.plan import make_plan, visible_pairs
from dlm_jax.attention.reference import attend_reference
from dlm_jax.attention.rules import BlockDiffusion, Causal, Rule

try:
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
except ImportError:
    torch = None

DIM, BLOCK, TOKENS = 128, 32, 32768  # head_dim, block size of the two streams, tokens per batch
GOAL = 1.2  # our rate over that of FlexAttention

Passes = dict[str, Callable[[], Any]]  # "forward", and "both" forward and backward, of one implementation


@dataclass(frozen=True)
class Shape:
    rule: Rule
    length: int  # of the input, both streams
    heads: int
    kv_heads: int

    @property
    def batch(self) -> int:
        return TOKENS // self.length

    @property
    def pairs(self) -> float:
        return self.batch * float(visible_pairs(self.rule, self.length)[0])

    def arrays(self, batch: int, length: int) -> list[jax.Array]:
        """q, k, v and the gradient of the output: [batch, length, heads, DIM]."""
        keys = jax.random.split(jax.random.key(0), 4)
        heads = self.heads, self.kv_heads, self.kv_heads, self.heads
        return [jax.random.normal(key, (batch, length, h, DIM), jnp.bfloat16) for key, h in zip(keys, heads)]


def in_jax(attend: Callable, arrays: list[jax.Array]) -> Passes:
    """The passes of an attention function in JAX."""
    def both(q: jax.Array, k: jax.Array, v: jax.Array, d_o: jax.Array) -> Any:
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_o)

    forward, both = jax.jit(attend), jax.jit(both)
    return {"forward": lambda: forward(*arrays[:3]), "both": lambda: both(*arrays)}


def in_torch(attend: Callable, arrays: list[Any]) -> Passes:
    """The passes of an attention function in PyTorch. arrays: [batch, heads, length, DIM]."""
    *inputs, d_o = arrays
    for x in inputs:
        x.requires_grad_()

    def forward() -> Any:
        with torch.no_grad():
            return attend(*inputs)

    return {"forward": forward, "both": lambda: torch.autograd.grad(attend(*inputs), inputs, d_o)}


def torch_arrays(shape: Shape, repeat: bool = False) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    kv_heads = shape.heads if repeat else shape.kv_heads
    return [torch.randn(shape.batch, h, shape.length, DIM, device="cuda", dtype=torch.bfloat16, generator=generator)
            for h in (shape.heads, kv_heads, kv_heads, shape.heads)]


def visible(shape: Shape, q: Any, k: Any) -> Any:
    """The mask of the rule in PyTorch, from indices."""
    if isinstance(shape.rule, Causal):
        return q >= k
    half = shape.length // 2
    q_block, k_block = q % half // BLOCK, k % half // BLOCK
    noisy_q, noisy_k = q < half, k < half
    return (noisy_q & noisy_k & (q_block == k_block)) | (noisy_q & ~noisy_k & (k_block < q_block)) | (
        ~noisy_q & ~noisy_k & (k_block <= q_block))


def ours(shape: Shape) -> Passes:
    plan = make_plan(shape.rule, shape.length)
    return in_jax(functools.partial(attend_gpu, plan=plan), shape.arrays(shape.batch, shape.length))


def flex(shape: Shape) -> Passes:
    mask = create_block_mask(lambda b, h, q, k: visible(shape, q, k), None, None, shape.length, shape.length, "cuda")
    torch._dynamo.reset()  # torch gives up compiling a function after too many shapes
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = shape.heads != shape.kv_heads
    return in_torch(lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped), torch_arrays(shape))


def dense(shape: Shape) -> Passes:
    index = torch.arange(shape.length, device="cuda")
    mask = visible(shape, index[:, None], index[None])
    attend = torch.nn.functional.scaled_dot_product_attention
    return in_torch(lambda q, k, v: attend(q, k, v, attn_mask=mask), torch_arrays(shape, repeat=True))


def cudnn(shape: Shape) -> Passes:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    return in_jax(attend, shape.arrays(*cudnn_size(shape)))


def cudnn_size(shape: Shape) -> tuple[int, int]:
    """Batch and length of causal attention with about as many visible pairs."""
    streams = 1 if isinstance(shape.rule, Causal) else 2
    return streams * shape.batch, shape.length // streams


IMPLEMENTATIONS = {"ours": ours, "flex": flex, "cuDNN causal": cudnn, "dense + mask": dense}


def finish(out: Any) -> None:
    jax.block_until_ready(out)  # ignores what is not a JAX array
    if torch is not None:
        torch.cuda.synchronize()


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The median seconds per call, over groups of calls long enough to hide the cost of launching."""
    for _ in range(3):
        finish(call())
    start = time.perf_counter()
    finish(call())
    calls = max(3, int(0.05 / (time.perf_counter() - start)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        finish(out)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def rates(name: str, shape: Shape, repeats: int) -> dict[str, float | str]:
    """Useful TFLOP/s of each pass, or why there is no figure."""
    if torch is None and name in ("flex", "dense + mask"):
        return dict.fromkeys(("forward", "both"), "not installed")
    pairs = shape.pairs
    if name == "cuDNN causal":
        batch, length = cudnn_size(shape)
        pairs = batch * float(visible_pairs(Causal(), length)[0])
    work, found = DIM * shape.heads * pairs * 1e-12, {}
    try:
        for key, call in IMPLEMENTATIONS[name](shape).items():
            found[key] = (4 if key == "forward" else 14) * work / seconds(call, repeats)
    except Exception as error:  # a library that fails here fills a cell of the table and does not end the run
        print(f"{name} on {shape}: {type(error).__name__}: {error}"[:400])
        if name == "ours":
            raise
    return {key: found.get(key, "failed") for key in ("forward", "both")}


def check() -> None:
    """Checks that our output and all gradients equal the reference to the precision of bfloat16."""
    for shape in (Shape(BlockDiffusion(384, BLOCK), 768, 4, 2), Shape(Causal(), 700, 4, 4)):
        plan = make_plan(shape.rule, shape.length)
        arrays = shape.arrays(2, shape.length)
        out = in_jax(functools.partial(attend_gpu, plan=plan), arrays)["both"]()
        with jax.default_matmul_precision("highest"):
            reference = in_jax(functools.partial(attend_reference, plan=plan),
                               [x.astype(jnp.float32) for x in arrays])["both"]()
        for name, mine, theirs in zip(("o", "dq", "dk", "dv"), jax.tree.leaves(out), jax.tree.leaves(reference)):
            error = float(jnp.abs(mine.astype(jnp.float32) - theirs).max() / jnp.abs(theirs).max())
            print(f"{type(shape.rule).__name__:>14} {name:>2}: largest error {error:.1e} relative to the largest value")
            assert error < 2 * float(jnp.finfo(jnp.bfloat16).eps), "ours differs from the reference"


def show(x: float | str) -> str:
    return f"{x:14.0f}" if isinstance(x, float) else f"{x:>14}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9, help="groups of calls per median")
    repeats = parser.parse_args().repeats
    if jax.default_backend() != "gpu":
        print("There is no GPU here, so there is nothing to measure: run this on a machine with a Hopper GPU.")
        return
    driver = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"],
                            capture_output=True, text=True).stdout.strip()
    print(f"{jax.devices()[0].device_kind} ({driver}), jax {jax.__version__}, numpy {np.__version__}, torch "
          f"{torch.__version__ if torch else 'not installed'}, cuDNN of torch "
          f"{torch.backends.cudnn.version() if torch else '-'}")
    check()
    two_streams = [(BlockDiffusion(n, BLOCK), 2 * n) for n in (1024, 2048, 4096)]
    print(f"\nuseful TFLOP/s, {TOKENS} tokens per batch, heads of {DIM}")
    print(f"{'':48}" + "".join(f"{name:>14}" for name in IMPLEMENTATIONS) + "   ours / flex")
    for rule, length in (*two_streams, (Causal(), 4096)):
        for kv_heads in (8, 32):
            row(Shape(rule, length, 32, kv_heads), repeats)


def row(shape: Shape, repeats: int) -> None:
    """Prints the lines of the table for one shape."""
    found = {name: rates(name, shape, repeats) for name in IMPLEMENTATIONS}
    for key, label in (("forward", "forward"), ("both", "forward + backward")):
        mine, theirs = found["ours"][key], found["flex"][key]
        ratio = "-"
        if isinstance(mine, float) and isinstance(theirs, float):
            ratio = f"{mine / theirs:.2f} ({'meets' if mine >= GOAL * theirs else 'misses'} {GOAL})"
        name = f"{type(shape.rule).__name__} {shape.length}, {shape.heads}/{shape.kv_heads}, {label}"
        print(f"{name:48}" + "".join(show(rates[key]) for rates in found.values()) + f"   {ratio}", flush=True)


if __name__ == "__main__":
    main()
