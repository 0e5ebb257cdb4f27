"""How low does the loss of a conversion go? Validation NELBO against training tokens, and the limit of that curve.

    python benchmarks/claims_tokens.py --base MODEL --train TRAIN.jsonl --validation VALIDATION.jsonl --workdir DIR

`--setup` is a two-stream setup of `claims_runs.py`; each number of steps is a separate run with its own schedule, and
the work directory may be that of `claims.py`. A power law L = floor + a * tokens^-b through the points extrapolates to
more tokens. The NELBO averages over all orders within a block; beside it is the cost of true text at k tokens per
forward, most confident first (with k = 1 an exact likelihood), and left to right. Prints a table; resumes if
interrupted.
"""

import argparse
from pathlib import Path

import numpy as np
from claims import CLAIMS, prepare_data
from claims_runs import GRID, LENGTH, PER_FORWARD, SETUPS, measured
from scipy.optimize import curve_fit

BATCH = 32
TWO_STREAM = [name for name, setup in SETUPS.items() if setup.recipe.streams == 2]
NIGHT = 20_000 * 36_000  # tokens: ten hours at what two CPU cores train per second


def power_law(tokens: np.ndarray, floor: float, a: float, b: float) -> np.ndarray:
    """Nats per token; tokens in millions (Hoffmann et al. 2022, equation 2, for one model size)."""
    return floor + a * tokens**-b


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--train", "--validation"):
        parser.add_argument(name, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--setup", choices=TWO_STREAM, default="hybrid_shifted")
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 200, 400, 800, 1600, 3200])
    parser.add_argument("--records", type=int, default=256)
    a = parser.parse_args()
    a.claims, counts = CLAIMS[:1], a.steps
    prepare_data(a)
    columns = {f"nelbo_{size}": f"block {size}" for size in GRID} | {
        f"parallel_{k}": f"{k} per forward" for k in PER_FORWARD} | {"ar_nll": "left to right"}
    print(f"| tokens (M) | {' | '.join(columns.values())} |\n|{'---:|' * (len(columns) + 1)}")
    tokens, nelbo = [], []
    for a.steps in counts:
        found = measured(a.setup, 0, a)
        tokens.append(a.steps * BATCH * LENGTH / 1e6)
        nelbo.append(found["nelbo"])
        print(f"| {tokens[-1]:.1f} | {' | '.join(f'{found[name]:.3f}' for name in columns)} |", flush=True)
    (floor, scale, power), _ = curve_fit(power_law, np.array(tokens), np.array(nelbo), (2.5, 1.0, 0.3),
                                         bounds=([0, 0, 0.01], [10, 10, 2]))
    print(f"\nNELBO = {floor:.2f} + {scale:.2f} * (tokens / 1M)^-{power:.2f} nats per token; after {NIGHT / 1e6:.0f}M "
          f"tokens that is {power_law(np.array(NIGHT / 1e6), floor, scale, power):.2f}")


if __name__ == "__main__":
    main()
