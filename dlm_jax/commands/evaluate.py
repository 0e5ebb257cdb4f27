"""`dlm eval`: the likelihood of texts."""

import argparse
import itertools
import sys
from typing import Any

from dlm_jax.commands.arguments import MODEL_HELP, TEXT_FIELD_HELP, Arguments, integer_at_least, unicode_text
from dlm_jax.commands.progress import count_progress


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm eval`."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--task", required=True, choices=["nelbo", "ar_nll"],
                        help="nelbo: the diffusion model's upper bound; ar_nll: exact, left to right")
    parser.add_argument("--text", required=True, nargs="+", help="text, JSONL or Parquet files")
    parser.add_argument("--text-field", type=unicode_text, default="text", metavar="NAME", help=TEXT_FIELD_HELP)
    parser.add_argument("--limit", type=integer_at_least(1), metavar="N", help="read at most N documents")
    parser.add_argument("--mc-samples", type=integer_at_least(1), default=4, metavar="N",
                        help="for nelbo: Monte Carlo samples (noisings) per text (default 4)")
    parser.add_argument("--seed", type=integer_at_least(0), default=0, metavar="N",
                        help="for nelbo: random seed of the noise (default 0)")


def run(a: Arguments) -> dict[str, Any]:
    """Evaluates; returns nats per token and over how many tokens."""
    from dlm_jax.data.text import read_documents
    from dlm_jax.language_model import load
    documents = read_documents(a.text, a.text_field)
    lm = load(a.model)
    texts = list(itertools.islice(documents, a.limit))
    if a.task == "nelbo" and lm.spec.mask_token_id is None:
        print("this model has no mask token: a new one, with the mean embedding, is used instead", file=sys.stderr)
    with count_progress("measured") as progress:
        if a.task == "ar_nll":
            result = lm.ar_nll(texts, progress)
        else:
            result = lm.nelbo(texts, mc_samples=a.mc_samples, seed=a.seed, progress=progress)
    return {"task": a.task, "nats_per_token": result, "tokens": result.tokens, "texts": len(texts)}
