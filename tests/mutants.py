"""`make mutants`: makes single changes at random in the mathematics, and says how many of them the tests notice.

    python tests/mutants.py [--sample 100] [--seed 0]

A change is one operator or one number of a file in `CORE`, as cosmic-ray makes them. Each is made in a copy of the
repository, where the tests of its room run until the first fails. A change that no test notices is printed; if it
changes nothing that can be observed, its line belongs into `EQUAL`, with the reason.

What came of each change is kept in `runs/mutants`, so a run that is stopped goes on when it is started again. Remove
that folder after changing tests.
"""

import argparse
import ast
import concurrent.futures
import hashlib
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from cosmic_ray.mutating import MutationVisitor
from cosmic_ray.plugins import get_operator

ROOT = Path(__file__).resolve().parents[1]
SWAPS = ("Add_Sub", "Sub_Add", "Mul_Add", "Div_Mul", "FloorDiv_Mul", "Mod_FloorDiv", "Pow_Mul", "BitAnd_BitOr",
         "BitOr_BitAnd")
COMPARED = ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Eq_NotEq", "NotEq_Eq", "Is_IsNot", "IsNot_Is")
OPERATORS = [*(f"ReplaceBinaryOperator_{swap}" for swap in SWAPS),
             *(f"ReplaceComparisonOperator_{swap}" for swap in COMPARED), "ReplaceUnaryOperator_Delete_USub",
             "ReplaceUnaryOperator_Delete_Invert", "ReplaceUnaryOperator_Delete_Not", "ReplaceAndWithOr",
             "ReplaceOrWithAnd", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "NumberReplacer"]
# The files to change, by the tests that are to notice.
CORE = {
    ("diffusion/corruption.py", "diffusion/cross_entropy.py", "diffusion/guidance.py", "diffusion/noise.py",
     "diffusion/schedule.py", "diffusion/weighting.py"):
        ("tests/diffusion", "tests/objective", "tests/evaluation", "tests/sampling/test_selector.py",
         "tests/training/test_step.py"),
    ("attention/rules.py", "attention/tiles.py", "attention/visibility.py", "attention/reference.py"):
        ("tests/attention", "tests/objective", "tests/evaluation", "tests/models"),
    ("objective/loss.py", "objective/sharded_cross_entropy.py"):
        ("tests/objective", "tests/diffusion", "tests/training/test_step.py", "tests/parallel"),
    ("sampling/engine.py", "sampling/cached_forward.py", "sampling/generation.py", "sampling/proposal.py",
     "sampling/revision.py", "sampling/selector.py", "sampling/speculation.py", "sampling/trace.py"):
        ("tests/sampling", "tests/convert/test_modeling_dlm.py", "tests/test_language_model.py"),
    ("training/step.py",): ("tests/training/test_step.py", "tests/training/test_loop.py", "tests/objective"),
}
VERDICTS = ROOT / "runs" / "mutants"  # a file for each change that was judged
TIMEOUT = 900  # seconds; a change that makes a loop endless is noticed by its length
# What `Change.line` prints: why no test can notice it.
EQUAL: dict[str, str] = {
    "diffusion/schedule.py: return jnp.minimum(1.0, (step + 1) / max(steps, 1)).astype(jnp.float32) -> "
    "return jnp.minimum(1.0, (step + 1) / max(steps, 0)).astype(jnp.float32)":
        "a ramp of no steps is then the minimum of 1 and infinity",
    "diffusion/noise.py: visible = (batch.segments > 0) & ~batch.masked -> visible = (batch.segments >= 0) & "
    "~batch.masked":
        "padding is a document of its own, of which nothing is masked",
    "attention/rules.py: block = 1  # a rule without blocks has blocks of one token -> "
    "block = 2  # a rule without blocks has blocks of one token":
        "only how many shifts of a document's start are tried, and a rule without blocks is the same for all",
    "sampling/generation.py: MIN_CANVAS = 64  # the shortest canvas; lengths double from there, so many requests share "
    "few compilations -> MIN_CANVAS = 65  # the shortest canvas; lengths double from there, so many requests share few "
    "compilations":
        "padding on the right changes no text",
    "sampling/revision.py: logits = jnp.take_along_axis(view.logits, tokens[..., None], -1)[..., 0] -> "
    "logits = jnp.take_along_axis(view.logits, tokens[..., None], -1)[..., -1]":
        "the last of one entry is the first",
    "sampling/proposal.py: picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0] -> "
    "picked = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 1]":
        "JAX clamps the index, which is that of the only entry",
    "sampling/speculation.py: index = jnp.clip(jnp.arange(trace.tokens.shape[1]) - 1 - start[:, None], 0, size - 1) -> "
    "index = jnp.clip(jnp.arange(trace.tokens.shape[1]) - 1 - start[:, None], 0, size + 1)":
        "what lies beyond the block is not read",
    "sampling/selector.py: return view.masked & (uniform(view) < unmask_fraction(linear, view)) -> "
    "return view.masked & (uniform(view) <= unmask_fraction(linear, view))":
        "a random number equals the fraction once in 2^23 draws",
    "sampling/selector.py: best_first = jnp.argsort(jnp.where(masked, -jnp.nan_to_num(score), jnp.inf), -1)  # stable "
    "-> best_first = jnp.argsort(jnp.where(masked, -jnp.nan_to_num(score), jnp.inf), 1)  # stable":
        "the last axis of two is axis 1",
    "training/step.py: if parts == 1: -> if parts == 2:":
        "two micro-batches at once have the same sums; only memory tells them apart",
    "objective/loss.py: return sharded_cross_entropy(params, shift(clean), tokens, targets[None], config)[0] -> "
    "return sharded_cross_entropy(params, shift(clean), tokens, targets[None], config)[ -1]":
        "the last of one entry is the first",
    "sampling/selector.py: return top[..., 0] - top[..., 1] -> return top[..., 0] - top[..., 2]":
        "JAX clamps the index, which is that of the last of two entries again",
    "training/step.py: skipped=skipped[1], -> skipped=skipped[ 2],":
        "JAX clamps the index, which is that of the last of two entries again",
    "sampling/selector.py: count = jnp.sum(lower - upper > self.margin, -1, keepdims=True)  # the difference falls "
    "with n -> count = jnp.sum(lower - upper > self.margin, 1, keepdims=True)  # the difference falls with n":
        "the last axis of two is axis 1",
    "sampling/proposal.py: MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4 -> "
    "MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 10001.0":
        "so hot a distribution is uniform either way, to fp32",
    "diffusion/noise.py: visible = (batch.segments > 0) & ~batch.masked -> visible = (batch.segments > -1) & "
    "~batch.masked":
        "padding is a document of its own, of which nothing is masked",
    "attention/tiles.py: @functools.lru_cache(maxsize=64) -> @functools.lru_cache(maxsize= 63)":
        "how much is remembered changes no result",
    "diffusion/cross_entropy.py: result = jax.eval_shape(sums, *(x[0] for x in chunks)) -> "
    "result = jax.eval_shape(sums, *(x[ 1] for x in chunks))":
        "all chunks have one shape",
    "diffusion/cross_entropy.py: picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0] -> "
    "picked = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., -1]":
        "the last of one entry is the first",
    "diffusion/cross_entropy.py: LOGITS_BUDGET = 2**27 -> LOGITS_BUDGET = 1**27":
        "how many logits are computed at once changes memory only",
    "sampling/speculation.py: drafted = trace.masked & (index > last[:, None]) & (index < end[:, None]) -> "
    "drafted = trace.masked & (index >= last[:, None]) & (index < end[:, None])":
        "the last token that was kept is not masked",
    'objective/loss.py: local_vocab = -(-config.vocab_size // axis_size(*AXES)) -> '
    'local_vocab = -(config.vocab_size // axis_size(*AXES))':
        "how many logits are computed at once changes memory only",
    "diffusion/cross_entropy.py: LOGITS_BUDGET = 2**27 -> LOGITS_BUDGET = 2** 28":
        "how many logits are computed at once changes memory only",
    "sampling/proposal.py: return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits) -> "
    "return jnp.where(bits < -1, bits ^ 0x7FFFFFFF, bits)":
        "-1 is the pattern of a NaN, and there is none",
    'attention/visibility.py: def training_rule(recipe: Recipe, length: int, step: Int[jax.Array, ""] | None = None, '
    'seed: int = 0) -> Rule: -> def training_rule(recipe: Recipe, length: int, step: Int[jax.Array, ""] | None = None, '
    "seed: int = 1) -> Rule:":
        "every run passes its seed; without one any draw of edges will do",
    "sampling/speculation.py: index = jnp.clip(jnp.arange(n) - 1 - start[:, None], 0, size - 1) -> "
    "index = jnp.clip(jnp.arange(n) - 1 - start[:, None], 0, size - 0)":
        "what lies beyond the block is not read",
    "sampling/revision.py: return jnp.exp(logits - jax.nn.logsumexp(view.logits, -1)) < self.min_probability -> "
    "return jnp.exp(logits - jax.nn.logsumexp(view.logits, -1)) <= self.min_probability":
        "a probability equals the limit in none of 2^23 draws",
    "sampling/proposal.py: return jnp.where(value < jax.lax.fori_loop(0, 32, halve, ends)[0], -jnp.inf, logits) -> "
    "return jnp.where(value < jax.lax.fori_loop( -1, 32, halve, ends)[0], -jnp.inf, logits)":
        "32 halvings find the number among 2^32; one more changes nothing",
    "sampling/selector.py: count = jnp.sum(lower - upper > self.margin, -1, keepdims=True)  # the difference falls "
    "with n -> count = jnp.sum(lower - upper >= self.margin, -1, keepdims=True)  # the difference falls with n":
        "the difference of two bounds equals the margin in none of 2^23 draws",
    "sampling/selector.py: cutoff = jnp.take_along_axis(jnp.sort(score, -1), jnp.minimum(stay_masked, score.shape[1] - "
    "1), -1) -> cutoff = jnp.take_along_axis(jnp.sort(score, -1), jnp.minimum(stay_masked, score.shape[1] - 1), 1)":
        "the last axis of two is axis 1",
    "sampling/generation.py: return length // 2 if needed <= length // 2 else length -> return length // 2 if needed < "
    "length // 2 else length":
        "how much of a canvas is read at first changes no text",
    "sampling/proposal.py: if p >= 1: -> if p >= 2:": "a shortcut: the search keeps every token as well where p is 1",
}


class Change(NamedTuple):
    """One change of one file."""

    file: str  # relative to the package
    tests: tuple[str, ...]
    source: str
    changed: str

    @property
    def line(self) -> str:
        """The file, and the first line that differs, before and after."""
        pairs = zip(self.source.splitlines(), self.changed.splitlines())
        before, after = next((a.strip(), b.strip()) for a, b in pairs if a != b)
        return f"{self.file}: {before} -> {after}"

    @property
    def verdict(self) -> Path:
        """The file that says what came of the change."""
        return VERDICTS / hashlib.sha256(f"{self.file} {self.changed}".encode()).hexdigest()[:16]


def changes() -> list[Change]:
    """Every change that can be made to the files in `CORE`."""
    found = []
    for files, tests in CORE.items():
        for file in files:
            source = (ROOT / "dlm_jax" / file).read_text(encoding="utf-8")
            found += [Change(file, tests, source, changed) for changed in changed_sources(source)]
    return found


def changed_sources(source: str) -> Iterator[str]:
    """`source` with each single change in turn that leaves a program, and not the same one."""
    same = what_runs(source)
    for name in OPERATORS:
        operator, occurrence = get_operator(f"core/{name}")(), 0
        while (changed := MutationVisitor.mutate_code(source, operator, occurrence)) is not None:
            if what_runs(changed) not in (None, same):
                yield changed
            occurrence += 1


def what_runs(source: str) -> str | None:
    """The syntax tree without its annotations and messages, or None where there is none: cosmic-ray takes the * of an
    argument list for a product."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(0)
        if isinstance(node, ast.JoinedStr):
            node.values = []
    return ast.dump(tree)


def tests_fail(tests: Iterable[str], copy: Path) -> bool:
    """Whether one of the tests fails in `copy`, a copy of the repository, or they do not end."""
    try:
        done = subprocess.run([sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *tests], cwd=copy,
                              env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
                              capture_output=True, timeout=TIMEOUT)
        return done.returncode != 0
    except subprocess.TimeoutExpired:
        return True


def noticed(change: Change, copy: Path) -> bool:
    """Whether a test fails in `copy` with the change. Tests named after the changed file run first."""
    target = copy / "dlm_jax" / change.file
    own = [str(path.relative_to(copy)) for path in (copy / "tests").rglob(f"test_{target.stem}.py")]
    target.write_text(change.changed, encoding="utf-8")
    try:
        return tests_fail((*own, *change.tests), copy)
    finally:
        target.write_text(change.source, encoding="utf-8")


def survivors(sample: list[Change], workers: int) -> list[Change]:
    """The changes that no test notices. Prints each as it is known."""
    copies: queue.SimpleQueue[Path] = queue.SimpleQueue()

    def survives(change: Change) -> bool:
        if not change.verdict.exists():
            copy = copies.get()
            try:
                said = "noticed " if noticed(change, copy) else "survived"
            finally:
                copies.put(copy)
            change.verdict.write_text(f"{said} {change.line}\n")
        print(change.verdict.read_text(), end="", flush=True)
        return change.verdict.read_text().startswith("survived")

    VERDICTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, concurrent.futures.ThreadPoolExecutor(workers) as threads:
        shared = ROOT.parent / "shared"
        if shared.is_dir():
            (Path(folder) / "shared").symlink_to(shared)
        for worker in range(workers):
            left_out = shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__")
            copy = Path(shutil.copytree(ROOT, Path(folder) / str(worker), ignore=left_out))
            copies.put(copy)
        for tests in {change.tests for change in sample if not change.verdict.exists()}:
            passed = VERDICTS / f"unchanged {hashlib.sha256(' '.join(tests).encode()).hexdigest()[:16]}"
            if not passed.exists() and tests_fail(tests, copy):
                sys.exit(f"without any change one of these fails already: {' '.join(tests)}; mend it first")
            passed.touch()
        return [change for change, alive in zip(sample, threads.map(survives, sample)) if alive]


def main() -> int:
    parser = argparse.ArgumentParser(description="Single changes at random, and how many of them the tests notice.")
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    a = parser.parse_args()
    possible = changes()
    sample = random.Random(a.seed).sample(possible, min(a.sample, len(possible)))
    alive = survivors(sample, a.workers)
    unexplained = [change.line for change in alive if change.line not in EQUAL]
    share = 1 - len(unexplained) / len(sample)
    print(f"{len(sample)} of {len(possible)} changes: {len(sample) - len(alive)} noticed, "
          f"{len(alive) - len(unexplained)} equal, {len(unexplained)} unexplained; {share:.0%} noticed or equal")
    print("\n".join(unexplained))
    return 0 if share >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
