"""Do the papers' claims hold in miniature? Small conversions of one base: same tokens, several seeds, paired.

    python benchmarks/claims.py --base MODEL --train TRAIN.jsonl --validation VALIDATION.jsonl --workdir DIR

Each run takes a minute or two on two CPU cores and leaves one file; an interrupted comparison resumes from those files.
Writes DIR/claims.md and DIR/claims.png, or the files --out names; --only selects claims by how they begin. With
`--base bundled --train python-stdlib --validation python-stdlib` the base is the package's own, five times as large.
"""

import argparse
import dataclasses
import platform
import shlex
from datetime import date
from pathlib import Path

import jax
import matplotlib
import numpy as np
from claims_runs import BLOCK, GRID, LENGTH, measure, measured, spread
from scipy.stats import t as student

from dlm_jax.commands.self_generate import write_samples
from dlm_jax.data.source import load_source
from dlm_jax.data.text import read_documents
from dlm_jax.files import write_text
from dlm_jax.language_model import load
from dlm_jax.sampling.settings import Settings

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASE = "the base"


@dataclasses.dataclass(frozen=True)
class Claim:
    """The setup `better` has a smaller `measure` than the setup `worse`, plus `margin`."""

    text: str
    better: str  # a name in SETUPS, or BASE
    worse: str
    measure: str = "nelbo"  # a key of what `claims_runs.measure` returns
    margin: float = 0.0  # in the units of the measure


CLAIMS = (
    Claim("adapted beats from scratch, one stream", "one shifted", "one shifted scratch"),
    Claim("adapted beats from scratch, two streams", "two same", "two same scratch"),
    Claim("shift beats same position, one stream (DiffuLLaMA)", "one shifted", "one same"),
    Claim("same position beats shift, two streams (Efficient-DLM)", "two same", "two shifted"),
    Claim("annealing helps (DiffuLLaMA)", "one shifted annealed", "one shifted"),
    Claim("annealing calms the first gradients", "one shifted annealed", "one shifted", "first_norms"),
    Claim("scattered annealing beats look-ahead", "one shifted annealed", "one shifted look-ahead"),
    Claim("blocks of noisy context beat one stream (Efficient-DLM)", "noisy blocks", "one same"),
    Claim("clean context beats noisy context (Efficient-DLM)", "two same", "noisy blocks"),
    Claim("clean context drifts less than noisy, attention", "two same", "noisy blocks", "drift_attention"),
    Claim("clean context drifts less than one stream, attention", "two same", "one same", "drift_attention"),
    Claim("clean context drifts less than one stream, mlp", "two same", "one same", "drift_mlp"),
    Claim("loss rises within a block more than in one stream", "one same", "two same", "position"),
    *(Claim(f"position-dependent masks of {half_life} beat uniform at {k} tokens per forward", f"late {half_life}",
            "exact", f"parallel_{k}") for half_life in (0.25, 0.1, 0.05) for k in (1, 2, 4)),
    *(Claim(f"training block {train} beats 16 where 16 is decoded", f"two same block {train}", "two same", "nelbo_16")
      for train in (4, 8, 32)),
    *(Claim(f"training block {size} is best where {size} is decoded", f"two same block {size}", "two same",
            f"nelbo_{size}") for size in (4, 8, 32)),
    Claim("full training beats LoRA 16 (Efficient-DLM)", "two same", "lora 16"),
    Claim("full training beats LoRA 64 (Efficient-DLM)", "two same", "lora 64"),
    Claim("LoRA 64 beats LoRA 16 (Efficient-DLM)", "lora 64", "lora 16"),
    Claim("token-causal clean half beats block-causal (NBDiff)", "token-causal", "two same"),
    Claim("AR loss helps the diffusion loss (Nemotron, NBDiff)", "token-causal AR", "token-causal"),
    Claim("AR loss keeps the AR ability to 0.1 nats", "token-causal AR", BASE, "ar_nll", 0.1),
    Claim("global averaging beats local (Nemotron)", "masked, batch", "masked, each"),
    Claim("growing blocks help (NBDiff)", "token-causal AR grown", "token-causal AR"),
    *(Claim(f"position-dependent masks help a token-causal AR model at {k} tokens per forward (new)",
            "token-causal AR late", "token-causal AR", f"parallel_{k}") for k in (1, 2, 4)),
    Claim("complementary masks help (Fast-dLLM v2)", "complementary", "exact m/k"),
    Claim("the base's own text is better training data", "own text", "two same"),
    Claim("shift beats same position beside an AR loss (new)", "token-causal AR shifted", "token-causal AR"),
    Claim("AR loss helps the diffusion loss of a shifted model (new)", "token-causal AR 1 shifted",
          "token-causal shifted"),
    Claim("an AR loss of weight 1 beats Nemotron's 1/0.3, shifted", "token-causal AR 1 shifted",
          "token-causal AR shifted"),
    *(Claim(f"position-dependent masks help hybrid_shifted at {k} tokens per forward (new)", "hybrid_shifted",
            "token-causal AR 1 shifted", f"parallel_{k}") for k in (1, 2, 4)),
    Claim("growing blocks help hybrid_shifted", "hybrid_shifted grown", "hybrid_shifted"),
    Claim("hybrid_shifted beats bd3lm", "hybrid_shifted", "two same"),
    *(Claim(f"hybrid_shifted beats efficient_dlm at {k} tokens per forward", "hybrid_shifted", "late 0.1",
            f"parallel_{k}") for k in (1, 2, 4)),
    Claim("hybrid_shifted keeps the AR ability to 0.1 nats", "hybrid_shifted", BASE, "ar_nll", 0.1),
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The verdict of the runs on a claim."""

    claim: Claim
    better: tuple[float, float]  # mean and standard deviation over seeds
    worse: tuple[float, float]
    gain: float  # worse + margin - better, paired by seed
    half_width: float  # of the gain's 95 % interval (Student's t); NaN with one seed

    @property
    def verdict(self) -> str:
        """'holds' or 'does not' where the interval of the gain excludes zero, else 'cannot tell'."""
        if not abs(self.gain) > self.half_width:  # true for NaN: one seed gives no interval
            return "cannot tell"
        return "holds" if self.gain > 0 else "does not"


def judge(claim: Claim, a: argparse.Namespace) -> Finding:
    """Runs whatever the claim needs and has no result file yet."""
    def values(name: str) -> np.ndarray:
        found = [a.base_measures if name == BASE else measured(name, seed, a) for seed in range(a.seeds)]
        return np.array([each[claim.measure] for each in found])

    better, worse = values(claim.better), values(claim.worse)
    gains = worse + claim.margin - better
    error = spread(gains)[1] / np.sqrt(len(gains)) * (student.ppf(0.975, len(gains) - 1) if len(gains) > 1 else 1)
    return Finding(claim, spread(better), spread(worse), float(gains.mean()), float(error))


def table(findings: list[Finding]) -> str:
    """One row per claim."""
    lines = ["| claim | measure | better | worse | gain | verdict |", "|---|---|---:|---:|---:|---|"]
    for f in findings:
        pair = [f"{name} {mean:.3f} ± {sd:.3f}" for name, (mean, sd) in ((f.claim.better, f.better),
                                                                       (f.claim.worse, f.worse))]
        lines.append(f"| {f.claim.text} | {f.claim.measure} | {pair[0]} | {pair[1]} | {f.gain:+.3f} ± "
                     f"{f.half_width:.3f} | {f.verdict} |")
    return "\n".join(lines)


def grid(a: argparse.Namespace) -> str:
    """Mean NELBO over seeds: one row per training block size, one column per decoding block size."""
    lines = [f"| trained in blocks of | {' | '.join(f'decoded in {size}' for size in GRID)} |",
             f"|---:|{'---:|' * len(GRID)}"]
    for size in GRID:
        name = "two same" if size == BLOCK else f"two same block {size}"
        found = [[measured(name, seed, a)[f"nelbo_{other}"] for other in GRID] for seed in range(a.seeds)]
        lines.append(f"| {size} | {' | '.join(f'{mean:.3f}' for mean in np.mean(found, 0))} |")
    return "\n".join(lines)


def draw(findings: list[Finding], path: Path) -> None:
    """Each gain relative to the larger mean, with its interval, colored by its verdict."""
    colors = {"holds": "#4e9a06", "does not": "#a40000", "cannot tell": "#888a85"}
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(findings)), layout="constrained")
    for y, f in enumerate(reversed(findings)):
        scale = 100 / max(abs(f.worse[0]), abs(f.better[0]), 1e-9)
        axes.errorbar(scale * f.gain, y, xerr=scale * np.nan_to_num(f.half_width), fmt="o",
                      color=colors[f.verdict])
    axes.axvline(0, color="black", linewidth=0.5)
    axes.legend([plt.Line2D([], [], marker="o", color=color) for color in colors.values()], colors, frameon=False)
    axes.margins(y=0.01)
    axes.set_yticks(range(len(findings)), [f.claim.text for f in reversed(findings)], fontsize=8)
    axes.set(xlabel="gain [% of the measure], 95 % interval over seeds")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def prepare_data(a: argparse.Namespace) -> None:
    """Prepares the records, once: of the texts, and of as many samples of the base. `a.rows` are those to validate."""
    (a.workdir / "runs").mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(a.workdir / "compiled"))
    lm = load(a.base)
    tokenizer = lm.text_tokenizer()
    own = a.workdir / "own.jsonl"
    sources = {"train": a.train}
    if any(claim.better == "own text" for claim in a.claims):
        sources["own"] = str(own)
        if not own.exists():
            count = sum(1 for _ in read_documents([a.train]))
            write_samples(lm, own, count, min(256, lm.config.max_length - 1), Settings(temperature=1.0))
    for name, source in sources.items():
        load_source(source, "train", tokenizer, LENGTH, a.workdir / name)
    validation = load_source(a.validation, "validation", tokenizer, LENGTH, a.workdir / "validation")
    a.rows = list(zip(*map(np.asarray, validation.rows(slice(0, a.records)))))


def report(findings: list[Finding], a: argparse.Namespace, figure: str) -> str:
    """The text of docs/claims_stories.md."""
    command = shlex.join(["python", "benchmarks/claims.py", "--base", Path(a.base).name, "--train", Path(a.train).name,
                          "--workdir", "runs/claims", "--validation", Path(a.validation).name, "--steps", str(a.steps),
                          "--seeds", str(a.seeds), "--records", str(a.records),
                          *(["--only", *a.only] if any(a.only) else [])])
    if len(findings) < len(CLAIMS):
        rest = f"{len(findings)} of the {len(CLAIMS)} claims in `claims.py`."
    else:
        rest = f"## Training and decoding block sizes\n\nNELBO in nats per token, means over the seeds.\n\n{grid(a)}"
    return f"""# The papers' claims in miniature

Every conversion starts from the same base and sees the same tokens: {a.steps} steps of 32 x {LENGTH}. Gains are paired
by seed ({a.seeds} of them); a claim holds, or does not, where the 95 % interval of its gain excludes zero. What holds
at this size need not hold at a larger one. All runs share the learning rate of `configs/tiny_stories.py`, tuned for
none of them; complementary masks run each record through the model twice, at twice the cost per token; growing
blocks spend half of so short a run below their full size.

    {command}

{date.today()}, {platform.machine()}, {jax.devices()[0].platform}, jax {jax.__version__}. Measures: `nelbo`, `ar_nll` in
nats per token on {a.records} validation records; `nelbo_B` decoded in blocks of B; `parallel_k` nats per token of true
text decoded k tokens of a block at a time, most confident first; `drift` mean absolute change of weights; `first_norms`
mean gradient norm of the first ten steps; `position` extra nats per token in the last quarter of a block over its
first. The base has an AR NLL of {a.base_measures["ar_nll"]:.3f}.

{table(findings)}

The claims about parallel decoding are [among the others](claims.md).

![gains]({figure})

{rest}
"""


def main() -> None:
    """Prepares the data, judges every claim, and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--base", "--train", "--validation"):
        parser.add_argument(name, required=True)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="report, its figure saved beside it (default: WORKDIR/claims.md)")
    parser.add_argument("--only", nargs="+", default=[""], help="how the chosen claims begin (default: all claims)")
    for name, default in (("--steps", 200), ("--seeds", 3), ("--records", 256)):
        parser.add_argument(name, type=int, default=default)
    a = parser.parse_args()
    a.claims = [claim for claim in CLAIMS if claim.text.startswith(tuple(a.only))]
    prepare_data(a)
    base = load(a.base)
    a.base_measures = measure(base, base, a.rows)
    findings = []
    for claim in a.claims:
        findings.append(judge(claim, a))
        print(table(findings[-1:]).splitlines()[-1], flush=True)
    out = a.out or a.workdir / "claims.md"
    write_text(out, report(findings, a, out.with_suffix(".png").name))
    draw(findings, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
