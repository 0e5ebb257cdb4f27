"""Attention compiled for a TPU that you do not have: the bundles of its kernels' bodies, and its temporary memory.

A TPU core issues one bundle of instructions per cycle, in the order that the compiler fixed, so the number of bundles
in straight-line code estimates its cycles. It does not count memory stalls, the steps of the grid, and a matrix unit
that is busier than the schedule assumes.
"""

import importlib
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dlm_jax.aot.topology import compile_for_chip, devices
from dlm_jax.attention.plan import make_plan
from dlm_jax.attention.rules import BlockDiffusion
from dlm_jax.attention.tpu import attend_tpu

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 8, 2, 128, 32
ROWS, KEYS = 512, 1024  # the tile that all sides are compared at
WIDTHS = (8, 4, 2, 1)  # the kv ranges of our kernels, in tiles of 128 keys; the widest is the entire tile
WIDEST = WIDTHS[0]
REFUSED = {("v4", "tokamax", "stored")}  # it compares bytes, which that chip cannot

# The names of the kernels of each side. A backward pass of two kernels costs the sum of both.
KERNELS = {
    "ours": {"forward": ["attention_forward"], "backward": ["attention_backward"]},
    "jax": {"forward": ["mha_fwd"], "backward": ["mha_dkv", "mha_dq"]},
    "jax fused": {"forward": ["mha_fwd"], "backward": ["mha_dkv"]},
    "tokamax": {"forward": ["mha_fwd"], "backward": ["mha_dkv"]},
}
SPLASH = {
    "jax": "jax.experimental.pallas.ops.tpu.splash_attention",
    "jax fused": "jax.experimental.pallas.ops.tpu.splash_attention",
    "tokamax": "tokamax._src.ops.experimental.tpu.splash_attention",
}

Kind = tuple[int, bool]  # of a body: its keys, in multiples of 128, and whether it applies a mask
Bodies = dict[Kind, int]  # bundles of each body


class Run(NamedTuple):
    """One run of straight-line code."""

    bundles: int
    products: int  # how many of its instructions are matrix products


def runs(dump: str) -> list[Run]:
    """The innermost regions with matrix products in a dump of final bundles, by address.

    In an attention kernel these are the bodies of its tiles: nothing else in it multiplies matrices.
    """
    address, starts, regions, products = 0, {}, set(), {}
    for line in dump.splitlines():
        if found := re.match(r"\s*(0x[0-9a-f]+|0)\s.*?{", line):
            address = int(found[1], 16)
            products[address] = len(re.findall(r"\bvmatmul\b", line))
        for edge, name in re.findall(r"(Start|End) region (\d+)", line):
            if edge == "Start":
                starts[name] = address
            elif name in starts:
                regions.add((starts[name], address + 1))
    inside = {(start, end): sum(products.get(i, 0) for i in range(start, end)) for start, end in regions}
    busy = sorted(region for region in regions if inside[region])
    return [Run(b - a, inside[a, b]) for a, b in busy
            if not any(other != (a, b) and a <= other[0] and other[1] <= b for other in busy)]


def name_bodies(found: list[Run], kinds: list[Kind]) -> Bodies:
    """Which run is which body. They are in the order in which the kernel is written, and the products of each body must
    be proportional to its keys."""
    widths = [round(WIDEST * run.products / found[0].products) for run in found]
    if widths != [width for width, _ in kinds]:
        raise RuntimeError(f"expected bodies of {kinds} x 128 keys, and found {found}")
    return dict(zip(kinds, (run.bundles for run in found)))


def kinds_of(side: str, mask: str) -> list[Kind]:
    """The bodies of a kernel, in the order in which it is written."""
    full, partial = (WIDEST, False), (WIDEST, True)
    if side == "ours":  # KernelSchedule.for_each_kv_range: the widest unmasked, then all masked
        return [full, *((width, True) for width in WIDTHS)]
    if mask == "full":
        return [full]
    # JAX's splash has one body for all tiles; tokamax's has one without the mask, then one with it. Both unroll their
    # loop over the slices of a tile, so a body is an entire tile.
    return [full, partial] if side == "tokamax" else [partial]


def count(topology: str, side: str, mask: str, length: int) -> dict[str, Bodies]:
    """The bundles of the bodies, forward and backward. Compiles in a fresh process, because the compiler reads its
    options only once."""
    kinds, counted = kinds_of(side, mask), {}
    with tempfile.TemporaryDirectory() as folder:
        alone(write_bundles, folder, topology, side, mask, length)
        for direction, names in KERNELS[side].items():
            files = [min(Path(folder).glob(f"*{name}*-final_bundles.txt")) for name in names]
            per_kernel = [name_bodies(runs(file.read_text(errors="replace")), kinds) for file in files]
            counted[direction] = {kind: sum(bodies[kind] for bodies in per_kernel) for kind in kinds}
    return counted


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function, called in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_bundles(folder: str, topology: str, side: str, mask: str, length: int) -> None:
    """Makes the compiler write its final bundles to a folder; those of all its passes would be hundreds of MB."""
    os.environ["LIBTPU_INIT_ARGS"] = (f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
                                      "--xla_jf_dump_llo_pass_label_regex=final_bundles")
    compile_for(topology, attention(side, mask, length), length)


def temporary_memory(topologies: list[str], side: str, lengths: list[int]) -> dict[tuple[str, int], int]:
    """Bytes that forward and backward together need beyond their arguments and results."""
    sizes = {}
    for length in lengths:
        attend = attention(side, "computed", length)  # splash preprocesses a mask tile by tile: once for all chips
        for topology in topologies:
            memory = compile_for(topology, attend, length).memory_analysis()
            sizes[topology, length] = memory.temp_size_in_bytes
    return sizes


def compile_for(topology: str, attend: Callable[..., jax.Array], length: int) -> Any:
    """Compiles forward and backward of one call, with arrays in the model's layout: [1, tokens, heads, head_dim]."""
    q, k = shapes(length)
    return compile_for_chip(topology, forward_and_backward(attend), q, k, k, q)


def attention(side: str, mask: str, length: int) -> Callable[..., jax.Array]:
    """The attention function of one side, of q, k and v."""
    return ours(length) if side == "ours" else splash(side, mask, length)


def shapes(length: int) -> list[jax.ShapeDtypeStruct]:
    """The shapes of q and of k."""
    return [jax.ShapeDtypeStruct((1, 2 * length, heads, HEAD_DIM), jnp.bfloat16) for heads in (HEADS, KV_HEADS)]


def forward_and_backward(attend: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The output and all gradients, as a function of q, k, v and the gradient of the output."""
    def both(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, pull = jax.vjp(attend, q, k, v)
        return o, pull(do)

    return both


def ours(length: int) -> Callable[..., jax.Array]:
    """Our own attention."""
    plan = make_plan(BlockDiffusion(length, BLOCK), 2 * length)
    return lambda q, k, v: attend_tpu(q, k, v, plan)


def splash(side: str, mask: str, length: int) -> Callable[..., jax.Array]:
    """Splash attention under a mask that is `full`, `computed` in the kernel, or `stored` tile by tile."""
    kernels, masks = (importlib.import_module(f"{SPLASH[side]}.splash_attention_{name}") for name in ("kernel", "mask"))
    tokens = np.arange(2 * length)
    chosen = {"full": lambda: masks.FullMask((2 * length, 2 * length)), "computed": lambda: computed(masks, length),
              "stored": lambda: masks.NumpyMask(two_streams(length, tokens[:, None], tokens))}[mask]()
    sizes = dict(block_q=ROWS, block_kv=KEYS, block_kv_compute=KEYS // 2, block_q_dkv=ROWS, block_kv_dkv=KEYS,
                 block_kv_dkv_compute=KEYS // 2)
    if side == "tokamax":
        config = kernels.SplashConfig(**sizes, dq_reduction_steps=3)
        kernel = kernels.make_splash_mha_single_device(chosen, config=config)
    else:
        sizes |= dict(use_fused_bwd_kernel=True) if side == "jax fused" else dict(block_q_dq=ROWS, block_kv_dq=KEYS)
        kernel = kernels.make_splash_mha_single_device(masks.MultiHeadMask([chosen] * HEADS),
                                                       block_sizes=kernels.BlockSizes(**sizes))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in (q / math.sqrt(HEAD_DIM), k, v))
        return jax.vmap(kernel)(q, k, v).swapaxes(1, 2)

    return attend


def two_streams(length: int, q: Any, k: Any) -> Any:
    """`BlockDiffusion` as a function of two indices, in few operations: a noisy block sees itself and the clean blocks
    before it, and a clean block sees itself and the clean blocks before it."""
    block_q, block_k, blocks = q // BLOCK, k // BLOCK, length // BLOCK
    end = q.__array_namespace__().where(block_q < blocks, block_q + blocks, block_q)
    return (block_q == block_k) | ((block_k >= blocks) & (block_k < end))


def computed(masks: Any, length: int) -> Any:
    """The two streams as a mask that splash computes in its kernels. Splash compares masks to find equal ones."""

    class TwoStreams(masks._ComputableMask):
        def __init__(self) -> None:
            super().__init__((2 * length, 2 * length), lambda q, k: two_streams(length, q, k))

        def __eq__(self, other: object) -> bool:
            return isinstance(other, TwoStreams)

        def __hash__(self) -> int:
            return length

    return TwoStreams()


def tilings(topology: str, lengths: list[int]) -> list[dict[str, int]]:
    """How many tiles of 128 keys our kernels hold in VMEM at once on a chip, forward and backward, per length."""
    mesh = jax.sharding.Mesh(devices(topology)[:1], ("chip",))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return [tiling(length) for length in lengths]


def tiling(length: int) -> dict[str, int]:
    """The same for one length, read from the traced kernels."""
    (q, k), found = shapes(length), {}
    for kernel in kernels_in(jax.make_jaxpr(forward_and_backward(ours(length)))(q, k, k, q).jaxpr):
        _, _, queries, keys = (x.aval.shape for x in kernel.params["jaxpr"].invars[:4])  # as both kernels take them
        rows = queries[1] * queries[2] // q.shape[-1]
        if rows != ROWS:
            raise RuntimeError(f"a tile of {kernel.params['name']} is {rows} rows and not {ROWS}, so it is not "
                               "comparable")
        found[kernel.params["name"].removeprefix("attention_")] = keys[1] // 128
    return found


def kernels_in(jaxpr: Any) -> Iterator[Any]:
    """The Pallas kernels that a program calls, in order."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        else:
            for inner in equation.params.values():
                yield from kernels_in(inner.jaxpr) if hasattr(inner, "jaxpr") else ()
