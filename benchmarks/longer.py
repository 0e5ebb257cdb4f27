"""What a longer conversion gives: the same base converted by several recipes on ever more tokens of its own text.

    python benchmarks/longer.py --base MODEL --text TRAIN.jsonl --validation VALIDATION.jsonl --workdir DIR

Each recipe and number of steps is a run with a schedule of its own (`--steps`, of 32 x 128 tokens), on the base's
greedy continuations of beginnings of the text. Of each model: the validation NELBO and the AR negative log likelihood,
then how it continues held-out beginnings, as `own_text.py` measures it. Prints a row for each model and way to decode.
Resumes where it stopped if interrupted; --recipes may be spread over several processes with one work directory.
"""

import argparse
import json
import platform
from datetime import date

import jax
from own_text import AR, add_flags, converted, documents, measure, own_text
from train_step import processor

from dlm_jax.evaluation.log_likelihood import AR as LEFT_TO_RIGHT
from dlm_jax.evaluation.log_likelihood import denoising_recipe, likelihood, texts_to_rows
from dlm_jax.files import write_text
from dlm_jax.language_model import LanguageModel, load

TOKENS_A_STEP = 32 * 128
COLUMNS = {"nelbo": ("NELBO", 3), "ar_nll": ("left to right", 3), "nll": ("under the base", 3),
           "distinct": ("distinct bigrams", 3), "per_forward": ("tokens per forward", 2)}


def likelihoods(lm: LanguageModel, a: argparse.Namespace) -> dict[str, float]:
    """Nats per token of held-out text, as the model denoises (a bound) and left to right."""
    rows = texts_to_rows([lm.encode(text)[:128] for text in documents(a.validation, held_out=True)[:a.rows]])
    return {name: float(likelihood(lm.params, lm.config, recipe, lm.spec.mask_token_id, rows, 4))
            for name, recipe in (("nelbo", denoising_recipe(lm.spec)), ("ar_nll", LEFT_TO_RIGHT))}


def figures(recipe: str, steps: int, base: LanguageModel, a: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What was measured of one conversion, for each way to decode; read from its file if it is there."""
    file = a.workdir / f"{recipe}-{steps}.json"
    if file.exists():
        return json.loads(file.read_text())
    a.recipe, a.steps = recipe, steps
    lm = converted(f"{recipe}-{steps}", own_text(base, a, range(4, 4 + 4 * a.beginnings, 4)), 0, a)
    ways = [way for way in a.strategies.split(",") if lm.spec.clean_half == "token_causal" or "speculate" not in way]
    nats = likelihoods(lm, a)
    found = {way: {**nats, **measure(lm, way, base, a)} for way in ways}
    write_text(file, json.dumps(found, indent=2) + "\n")
    return found


def main() -> None:
    """Converts, decodes, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--recipes", default="hybrid_shifted,efficient_dlm,bd3lm,nemotron")
    parser.add_argument("--steps", type=int, nargs="+", default=[760, 3050, 12_200])
    parser.add_argument("--strategies", default="confidence,threshold:0.9,threshold:0.7,speculate:4",
                        help="`speculate` is left out where the clean half is no AR model")
    parser.add_argument("--beginnings", type=int, default=16, help="of each text: of 4, 8, 12, ... tokens")
    parser.add_argument("--rows", type=int, default=256, help="held-out texts for the likelihoods")
    a = parser.parse_args()
    a.workdir.mkdir(parents=True, exist_ok=True)
    base = load(a.base)
    print(f"{date.today()}, {processor()}, Python {platform.python_version()}, jax {jax.__version__}; the base: "
          f"{measure(base, AR, base, a)['nll']:.3f} nats per token of its greedy continuations")
    print("| recipe | tokens (M) | decoding | " + " | ".join(title for title, _ in COLUMNS.values()) + " |")
    print("|---|---:|---" + "|---:" * len(COLUMNS) + "|", flush=True)
    for steps in sorted(a.steps):
        for recipe in a.recipes.split(","):
            for way, found in figures(recipe, steps, base, a).items():
                cells = [f"{found[key]:.{digits}f}" for key, (_, digits) in COLUMNS.items()]
                print(f"| {recipe} | {steps * TOKENS_A_STEP / 1e6:.1f} | {way} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
