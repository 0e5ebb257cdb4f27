"""The last part of `dlm demo`: a text with structure, written left to right and many tokens at a time."""

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dlm_jax.language_model import LanguageModel
    from dlm_jax.sampling.sample import Sample

CONFIG = "records"
AR_STEPS = 80
TRAIN, TEST, LENGTH, MAX_TOKENS = 8_000, 20, 128, 96
UNMASKING = "speculate"


@dataclasses.dataclass(frozen=True)
class Score:
    """How a model answers the questions, one at a time."""

    samples: "list[Sample]"
    exact: float  # the share of answers that are right to the letter

    @property
    def tokens_per_forward(self) -> float:
        return sum(sample.new_tokens for sample in self.samples) / sum(sample.nfe for sample in self.samples)

    @property
    def tokens_per_second(self) -> float:
        return sum(s.new_tokens for s in self.samples) / sum(s.cost.seconds for s in self.samples)


def train_both(out: Path, base: str = "bundled") -> "tuple[LanguageModel, LanguageModel, list[tuple[str, str]]]":
    """The base fine-tuned left to right, the model converted from that, and pairs that neither has seen."""
    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config
    from dlm_jax.data.contacts import contacts
    from dlm_jax.data.pairs import prepare_pairs
    from dlm_jax.diffusion.recipes import recipe
    from dlm_jax.language_model import load
    pairs = list(itertools.islice(contacts(seed=0), TEST + TRAIN))
    for name, start, changes in (("ar", base, [f"train.steps={AR_STEPS}"]), ("hybrid_shifted", str(out / "ar"), [])):
        records = out / f"records_{name}"
        prepare_pairs(pairs[TEST:], load(base).text_tokenizer(), LENGTH, records, max(recipe(name).block_size, 1))
        adapt(load_config(CONFIG, [f"recipe={name}", f"model.base={start}", f"data.train={records}",
                                   f"data.validation={records}", *changes]), out / name)
    return load(out / "ar"), load(out / "hybrid_shifted"), pairs[:TEST]


def score(lm: "LanguageModel", pairs: list[tuple[str, str]], **settings: Any) -> Score:
    """Asks each question alone, greedily."""
    samples = [lm.sample(question + "\n", max_tokens=MAX_TOKENS, **settings) for question, _ in pairs]
    right = [sample.text == f"{question}\n{answer}" for sample, (question, answer) in zip(samples, pairs)]
    return Score(samples, sum(right) / len(right))


def run(out: Path, console: "Console") -> dict[str, float]:
    """Trains both, shows them write the same text, also as `race.gif`, and compares them."""
    from dlm_jax.sampling.picture import write_race
    from dlm_jax.sampling.render import race
    ar, converted, pairs = train_both(out)
    left_to_right, speculating = score(ar, pairs), score(converted, pairs, unmasking=UNMASKING)
    pieces = ar.text_tokenizer().pieces
    shown = typical(left_to_right, speculating)
    runs = {name: (pieces(found.samples[shown].tokens), found.samples[shown])
            for name, found in (("left to right", left_to_right), ("diffusion", speculating))}
    race(runs, console)
    write_race(runs, out / "race.gif")
    console.print(table(left_to_right, speculating))
    return {"exact_ar": left_to_right.exact, "exact": speculating.exact,
            "tokens_per_forward": speculating.tokens_per_forward,
            "times_faster": speculating.tokens_per_second / left_to_right.tokens_per_second}


def typical(slow: Score, fast: Score) -> int:
    """The question whose answers differ in time as they do in the middle."""
    ratios = [b.cost.seconds / a.cost.seconds for a, b in zip(slow.samples, fast.samples)]
    return sorted(range(len(ratios)), key=lambda i: ratios[i])[len(ratios) // 2]


def table(left_to_right: Score, speculating: Score) -> "Table":
    """Both side by side."""
    from rich.table import Table
    result = Table(title=f"{len(left_to_right.samples)} new lines to JSON, one at a time")
    for column in ("", "exactly right", "tokens per forward", "tokens per second"):
        result.add_column(column, justify="right" if column else "left")
    for name, found in (("autoregressive", left_to_right), ("converted", speculating)):
        result.add_row(name, f"{found.exact:.0%}", f"{found.tokens_per_forward:.2f}", f"{found.tokens_per_second:,.0f}")
    return result
