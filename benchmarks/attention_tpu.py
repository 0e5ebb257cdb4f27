"""Attention on TPUs against JAX's splash attention and tokamax's, from compiled code alone: no TPU is needed.

    python benchmarks/attention_tpu.py [--chips v5e,v5p,v6e,tpu7x] [--lengths 512,1024,2048,4096,8192]

All attend under the same mask, `BlockDiffusion(L, 32)`: two streams of L tokens. The output has the bundles of a tile
of 512 rows x 1024 keys (`tpu_bundles.py` explains bundles), the computed pairs per visible pair, and from both the
cycles of a complete call. Where a tile has fewer bundles than its products take cycles in the matrix unit, its cycles
are the latter: the floor. Compiling takes minutes. tokamax is optional.
"""

import argparse
import functools
import importlib.metadata
import importlib.util
import platform
import sys
from collections import Counter
from datetime import date

import numpy as np
from tpu_bundles import (
    BLOCK,
    HEAD_DIM,
    HEADS,
    KERNELS,
    KEYS,
    KV_HEADS,
    REFUSED,
    ROWS,
    TOPOLOGIES,
    WIDEST,
    WIDTHS,
    Bodies,
    Kind,
    alone,
    count,
    temporary_memory,
    tilings,
)

from dlm_jax.attention.plan import Plan, make_plan
from dlm_jax.attention.rules import BlockDiffusion
from dlm_jax.attention.tiles import TILE, coarsen

# The fewest cycles that one product of a tile can take. The matrix units of v6e and tpu7x are 256 wide, and a product
# with head_dim 128 on the wrong side fills half of them and takes 512.
FLOOR = {"v4": 1024, "v5e": 1024, "v5p": 1024, "v6e": 256, "tpu7x": 256}
PRODUCTS = {"forward": dict.fromkeys(KERNELS, 2), "backward": {**dict.fromkeys(KERNELS, 5), "jax": 7}}
TITLES = {"ours": "ours", "jax": "jax splash", "jax fused": "jax splash fused", "tokamax": "tokamax splash"}
MASKS = {side: ["intervals"] if side == "ours" else ["full", "computed", "stored"] for side in KERNELS}
THE_SAME = [("jax fused", "forward")]  # it is the forward kernel of "jax"
FULL, PARTIAL = (WIDEST, False), (WIDEST, True)
TARGETS = [  # numerator, denominator, and the target of each chip
    (("ours", "forward", FULL), ("jax", "forward", FULL), {"v5e": 0.95, "v5p": 0.95, "v6e": 1.0, "tpu7x": 1.0}),
    (("ours", "backward", FULL), ("jax", "backward", FULL), dict.fromkeys(TOPOLOGIES, 0.75)),
    (("ours", "backward", FULL), ("tokamax", "backward", FULL), dict.fromkeys(TOPOLOGIES, 1.0)),
    (("ours", "forward", PARTIAL), ("ours", "forward", FULL), dict.fromkeys(TOPOLOGIES, 1.13)),
    (("ours", "backward", PARTIAL), ("ours", "backward", FULL), dict.fromkeys(TOPOLOGIES, 1.13)),
]
WASTE_AT_MOST = {1024: 1.30, 4096: 1.10}  # computed pairs per visible pair, by length
ABSENT = "not installed"

Counts = dict[tuple[str, str], dict[str, Bodies]]  # of one chip: (side, mask) -> direction -> bodies


def table(head: list[str], rows: list[list[str]]) -> None:
    """Prints a table."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def bundles(counts: Counts, side: str, direction: str, kind: Kind) -> int | None:
    """The bundles of a body, under the cheapest mask."""
    found = [of[direction] for (name, _), of in counts.items() if name == side]
    return min((bodies[kind] for bodies in found if kind in bodies), default=None)


def floor(chip: str, side: str, direction: str, kind: Kind) -> int:
    """The fewest cycles that the products of a body can take."""
    return FLOOR[chip] * PRODUCTS[direction][side] * kind[0] // WIDEST


def cycles(chip: str, counts: Counts, side: str, direction: str, kind: Kind) -> int | None:
    """The cycles of a body: its bundles or its floor, whichever is more."""
    found = bundles(counts, side, direction, kind)
    return found and max(found, floor(chip, side, direction, kind))


def print_bundles(counted: dict[str, Counts]) -> None:
    """Prints one row per kind of tile and side, and one column per chip."""
    print(f"Bundles of a tile of {ROWS} rows x {KEYS} keys (in parentheses the floor, where it is higher). Splash's "
          "full tiles are those of a mask that hides nothing; under any other mask, jax splash treats all tiles as "
          "partial.\n")
    rows = [[f"{direction}, {'partial' if kind == PARTIAL else 'full'}", f"{TITLES[side]}, {mask}",
             *(cell(chip, counts, side, mask, direction, kind) for chip, counts in counted.items())]
            for direction in PRODUCTS for kind in (FULL, PARTIAL) for side in KERNELS for mask in MASKS[side]
            if (side == "ours" or (mask == "full") == (kind == FULL)) and (side, direction) not in THE_SAME]
    table(["tile", "side, mask", *counted], rows)


def cell(chip: str, counts: Counts, side: str, mask: str, direction: str, kind: Kind) -> str:
    """A body's bundles."""
    if (side, mask) not in counts:
        return "does not compile" if (chip, side, mask) in REFUSED else ABSENT
    found, least = counts[side, mask][direction][kind], floor(chip, side, direction, kind)
    return f"{found} ({least})" if found < least else f"{found}"


def print_ratios(counted: dict[str, Counts]) -> None:
    """Prints how our kernels compare, and whether they meet their targets."""
    print("Ratios of those bundles, and in parentheses of the cycles; both must meet the target.\n")
    rows = []
    for ours, theirs, targets in TARGETS:
        names = [f"{TITLES[side]}, {'partial' if kind == PARTIAL else 'full'}" for side, _, kind in (ours, theirs)]
        rows.append([f"{ours[1]}: {' / '.join(names)}",
                     *(ratio(chip, counts, ours, theirs, targets.get(chip)) for chip, counts in counted.items())])
    table(["ratio", *counted], rows)


def ratio(chip: str, counts: Counts, ours: tuple[str, str, Kind], theirs: tuple[str, str, Kind],
          target: float | None) -> str:
    """The ratio of two bodies, and whether it meets its target."""
    if bundles(counts, *theirs) is None:
        return ABSENT
    plain, real = (of(*ours) / of(*theirs) for of in (functools.partial(bundles, counts),
                                                      functools.partial(cycles, chip, counts)))
    text = f"{plain:.3f} ({real:.3f})"
    return text if target is None else f"{text} {verdict(max(plain, real), target)}"


def verdict(value: float, target: float) -> str:
    """A target, and whether a value meets it."""
    return f"<= {target:.2f} {'met' if value <= target else 'NOT MET'}"


def kv_ranges(plan: Plan, piece: int) -> Counter[Kind]:
    """How often each body of our kernels runs for one key-value head, as `KernelSchedule.for_each_kv_range` chooses:
    the widest kv range that fits, without the mask where all of it is visible. A kernel holds `piece` tiles of keys at
    once."""
    bounds, found = coarsen(plan.tiles, ROWS * KV_HEADS // HEADS // TILE)[0].reshape(-1, 4), Counter()
    for before in range(0, bounds.max(), piece):
        for start, full, full_end, end in np.clip(bounds - before, 0, piece).tolist():
            while start < end:
                unmasked = full <= start and start + WIDEST <= full_end
                width = WIDEST if unmasked else next(width for width in WIDTHS if width <= end - start)
                found[width, not unmasked] += 1
                start += width
    return found


def tiles(plan: Plan, rows: int, keys: int) -> tuple[int, int]:
    """How many tiles of rows x keys are full, and how many are partial."""
    start, seen = np.arange(0, plan.lo.shape[-1], keys), 0
    for lo, hi in zip(plan.lo[0, :, :, None], plan.hi[0, :, :, None]):  # regions do not overlap
        seen = seen + np.maximum(np.minimum(hi, start + keys) - np.maximum(lo, start), 0)
    seen = seen.reshape(-1, rows, len(start))
    full = (seen == keys).all(1)
    return int(full.sum()), int((seen.any(1) & ~full).sum())


def print_waste(plans: dict[int, Plan]) -> None:
    """Prints the work on hidden pairs, by length."""
    print("Computed pairs per visible pair\n")
    rows = []
    for length, plan in plans.items():
        visible = int((plan.hi - plan.lo).sum())
        computed = sum(width * times for (width, _), times in kv_ranges(plan, 2**30).items())
        ours = computed * TILE * ROWS * KV_HEADS // HEADS / visible
        splash = [sum(tiles(plan, *size)) * size[0] * size[1] / visible for size in ((ROWS, KEYS), (TILE, TILE))]
        target = verdict(ours, WASTE_AT_MOST[length]) if length in WASTE_AT_MOST else ""
        rows.append([f"{length}", f"{ours:.3f} {target}".strip(), *(f"{waste:.3f}" for waste in splash)])
    table(["L", "ours", f"splash, tiles of {ROWS} x {KEYS}", f"splash, tiles of {TILE} x {TILE}"], rows)


def call(chip: str, counts: Counts, side: str, direction: str, plan: Plan, piece: int) -> int | None:
    """The cycles of one call: those of every body that runs, over all heads."""
    heads, runs = KV_HEADS, kv_ranges(plan, piece)
    if side != "ours":
        full, partial = tiles(plan, ROWS, KEYS)
        heads, runs = HEADS, Counter({FULL: full, PARTIAL: partial}) if side == "tokamax" else \
            Counter({PARTIAL: full + partial})
    cycles_per_run = {kind: cycles(chip, counts, side, direction, kind) for kind in runs}
    if None in cycles_per_run.values():
        return None
    return heads * sum(cycles_per_run[kind] * times for kind, times in runs.items())


def print_calls(chip: str, counts: Counts, plans: dict[int, Plan], memory: dict[str, dict]) -> None:
    """Prints the cycles and memory of complete calls on a chip, by length."""
    print(f"{chip}: thousands of cycles of the tiles of one call, splash with its cheapest mask (excluding what starts "
          "and ends a row of tiles, the steps of the grid, and the sums of dq that splash computes outside its "
          "kernels); MiB of temporary memory of forward and backward, beyond what stays on the chip\n")
    rows = []
    for (length, plan), pieces in zip(plans.items(), alone(tilings, TOPOLOGIES[chip], list(plans))):
        row = [f"{length}"]
        for direction in PRODUCTS:
            found = {side: call(chip, counts, side, direction, plan, pieces[direction]) for side in KERNELS
                     if (side, direction) not in THE_SAME}
            row += [ABSENT if x is None else f"{x / 1000:.0f}" for x in found.values()]
            ours, *others = (x for x in found.values() if x is not None)
            row.append(f"{ours / min(others):.2f}")
        rows.append(row + [f"{memory[side][TOPOLOGIES[chip], length] / 2**20:.1f}" if side in memory else ABSENT
                           for side in KERNELS])
    short = {**TITLES, "jax fused": "fused"}.values()
    table(["L", "forward: ours", "jax splash", "tokamax", "ours / best other", "backward: ours", "jax splash",
           "fused", "tokamax", "ours / best other", *(f"memory: {name}" for name in short)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chips", default="v5e,v5p,v6e,tpu7x", help=f"some of {', '.join(TOPOLOGIES)}")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192", help="tokens per stream, multiples of 512")
    options = parser.parse_args()
    chips, lengths = options.chips.split(","), [int(length) for length in options.lengths.split(",")]
    if set(chips) - TOPOLOGIES.keys() or any(length % 512 for length in lengths):
        parser.error("unknown chip, or a length that is not a multiple of 512")
    if importlib.util.find_spec("libtpu") is None:
        print("Nothing to report: compiling for a TPU needs libtpu (pip install 'dlm-jax[tpu]').")
        return
    sides = [side for side in KERNELS if side != "tokamax" or importlib.util.find_spec("tokamax")]
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "libtpu"))
    tokamax = importlib.metadata.version("tokamax") if "tokamax" in sides else ABSENT
    print(f"{date.today()} · compiled on {platform.machine()} · Python {platform.python_version()}, {versions}, "
          f"tokamax {tokamax} · BlockDiffusion(L, {BLOCK}), bf16, batch 1, {HEADS} heads on {KV_HEADS}, "
          f"head_dim {HEAD_DIM}")
    print(f"`{' '.join(['python', *sys.argv])}`\n", flush=True)
    plans = {length: make_plan(BlockDiffusion(length, BLOCK), 2 * length) for length in lengths}
    print_waste(plans)
    counted = {chip: {(side, mask): count(TOPOLOGIES[chip], side, mask, 1024) for side in sides
                      for mask in MASKS[side] if (chip, side, mask) not in REFUSED} for chip in chips}
    print_bundles(counted)
    print_ratios(counted)
    memory = {side: alone(temporary_memory, [TOPOLOGIES[chip] for chip in chips], side, lengths) for side in sides}
    for chip, counts in counted.items():
        print_calls(chip, counts, plans, memory)


if __name__ == "__main__":
    main()
