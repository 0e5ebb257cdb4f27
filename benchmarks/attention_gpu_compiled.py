"""Our own Hopper kernels, judged by their machine code: no GPU is needed, only `pip install 'dlm-jax[gpu]'`.

    python benchmarks/attention_gpu_compiled.py [--lengths 1024,2048,4096]

The kernels are compiled for an H200, and the first table reads the assembler's own listing: what spills to memory (and
how often in the loop over tiles), and what one warp does per step of that loop, for full and for partial tiles. A step
keeps the tensor cores busy for N / 2 cycles per HGMMA.64xNx16 (4096 floating-point operations per cycle and
multiprocessor). Two warps share a scheduler and two warpgroups share the tensor cores, so a step is bound by the tensor
cores as long as a warp's instructions (one per cycle) and its special functions (8 cycles each) take fewer cycles.

The second table bounds the rate of complete passes: the peak rate of an H200, times the visible fraction of the
computed pairs, times the fraction of the products that count (5 of the 7 in a backward pass). Nothing here measures
time; where there is a GPU, `attention_gpu.py` does.
"""

import argparse
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp

from dlm_jax.aot.topology import compile_for_chip, devices
from dlm_jax.attention import gpu
from dlm_jax.attention.plan import make_plan, visible_pairs
from dlm_jax.attention.rules import Annealed, BlockDiffusion, Causal
from dlm_jax.attention.tiles import TILE
from dlm_jax.errors import UserError
from dlm_jax.parallel.device_specs import DEVICE_SPECS

PEAK = DEVICE_SPECS["NVIDIA H200"].flops * 1e-12
SPECIAL = 8  # cycles per special function of a warp
LENGTH, HEADS, KV_HEADS = 4096, 32, 8
RULES = {"block_diffusion": lambda: BlockDiffusion(LENGTH // 2, 32), "causal": Causal,
         "annealed": lambda: Annealed(jnp.float32(0.3), jnp.uint32(5))}


@dataclass(frozen=True)
class Code:
    """What matters of a kernel's machine code."""

    spilled: int  # bytes
    moved: int  # instructions inside the loop over tiles that move spilled words
    step: list[str]  # all instructions of one step of that loop
    masking: list[str]  # those of them that apply the mask


def read(listing: str, report: str) -> Code:
    """Reads the assembler's listing of a kernel, and its report."""
    labels, code = {}, []
    for line in listing.splitlines():
        if found := re.match(r"(\.L_x_\d+):", line):
            labels[found[1]] = len(code)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*)", line):
            code.append(found[1])
    jumps = [(at, labels[found[1]]) for at, text in enumerate(code)
             if (found := re.search(r"BRA.*?(\.L_x_\d+)", text)) and found[1] in labels]
    products = [at for at, text in enumerate(code) if "HGMMA" in text]
    _, start, end = min((at - to, to, at) for at, to in jumps if to <= products[0] and products[-1] < at)
    # In a full tile one jump skips the masking: the longest jump inside the loop that skips no product.
    _, skip, to = max((to - at, at, to) for at, to in jumps
                      if start < at < to < end and not any(at < product < to for product in products))
    step = code[start:end + 1]
    return Code(int(re.search(r"(\d+) bytes spill stores", report)[1]),
                sum("STL" in text or "LDL" in text for text in step), step, code[skip + 1:to])


def compiled(kernel: Callable, *arguments: Any) -> Code:
    """The machine code of a kernel, for arguments of these shapes."""
    with tempfile.TemporaryDirectory() as listings:
        os.environ["MOSAIC_GPU_DUMP_TO"] = listings
        compile_for_chip("h200:1", lambda q, *rest: kernel(None, q.shape[-1] ** -0.5, q, *rest), *arguments)
        written = {path.suffix: path.read_text() for path in Path(listings).iterdir()}
    return read(written[".sass_ctrl"], written[".ptxas"])


def kernels(rule: Any, d: int) -> dict[str, Code]:
    """The three kernels under a rule, for heads of d dimensions."""
    q = jax.ShapeDtypeStruct((1, LENGTH, HEADS, d), jnp.bfloat16)
    k = jax.ShapeDtypeStruct((1, LENGTH, KV_HEADS, d), jnp.bfloat16)
    row = jax.ShapeDtypeStruct((1, HEADS, LENGTH), jnp.float32)
    visits = gpu.visit_lists(make_plan(rule, LENGTH), LENGTH)
    return {"forward": compiled(gpu.launch_forward, q, k, k, visits),
            "dQ": compiled(gpu.launch_d_queries, q, k, k, q, row, row, visits),
            "dK, dV": compiled(gpu.launch_d_keys, q, k, k, q, row, row, visits)}


def line(rule: Any, d: int, name: str, code: Code) -> str:
    """A row of the first table."""
    tensor = sum(int(n) // 2 for n in re.findall(r"HGMMA\.64x(\d+)x16", "\n".join(code.step)))
    special = SPECIAL * sum("MUFU" in text for text in code.step)
    cycles = len(code.step) - len(code.masking), len(code.step), special
    ratios = " | ".join(f"{x} ({x / tensor:.2f})" for x in cycles)
    return f"| {type(rule).__name__} | {d} | {name} | {code.spilled} ({code.moved}) | {tensor} | {ratios} |"


def ceilings(length: int) -> str:
    """A row of the second table: two streams of `length` tokens, block 32."""
    rule = BlockDiffusion(length, 32)
    tiles = make_plan(rule, 2 * length).tiles
    computed = int((tiles[..., 3] - tiles[..., 0]).sum()) * TILE**2
    visible = float(visible_pairs(rule, 2 * length)[0]) / computed
    return f"| {length} | {1 / visible:.2f} | {PEAK * visible:.0f} | {PEAK * visible * 7 / 9:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", default="1024,2048,4096", help="of a stream, for the second table")
    parser.add_argument("--head-dims", type=int, nargs="+", choices=(64, 128), default=(64, 128))
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    a = parser.parse_args()
    try:
        devices("h200:1")
    except UserError as error:
        print(f"Nothing to report: {error}")
        return
    os.environ |= {"MOSAIC_GPU_DUMP_SASS_CTRL": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    print(f"jax {jax.__version__}, Python {platform.python_version()}, {date.today()}\n")
    print("| rule | head_dim | kernel | bytes spilled (moves in the loop) | tensor cores | a warp, full tile | partial "
          "tile | special functions |\n" + 8 * "|---" + "|")
    for rule in (RULES[name]() for name in a.rules):
        for d in a.head_dims:
            for name, code in kernels(rule, d).items():
                print(line(rule, d, name, code), flush=True)
    print("\n| L | pairs computed for each visible | useful TFLOP/s at most, forward | forward + backward |")
    print(4 * "|---" + "|")
    print(*map(ceilings, map(int, a.lengths.split(","))), sep="\n")


if __name__ == "__main__":
    main()
