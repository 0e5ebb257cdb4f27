"""`dlm self-generate`: text that an autoregressive base writes itself, to train on.

A short conversion on its own text keeps a model closer to what it knows.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.commands.arguments import MODEL_HELP, Arguments, add_draw_flags, add_seed_flag, integer_at_least
from dlm_jax.errors import UserError
from dlm_jax.files import check_new, write_text
from dlm_jax.models.diffusion_spec import DiffusionSpec

if TYPE_CHECKING:
    from dlm_jax.language_model import LanguageModel
    from dlm_jax.sampling.settings import Settings


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm self-generate`."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--out", required=True, help="new file of JSON lines")
    parser.add_argument("--documents", required=True, type=integer_at_least(1), metavar="N", help="number of samples")
    parser.add_argument("--max-tokens", required=True, type=integer_at_least(1), metavar="N",
                        help="new tokens per sample at most")
    parser.add_argument("--prompts", nargs="+", metavar="FILE", help="texts whose beginnings start the samples")
    parser.add_argument("--prompt-tokens", type=integer_at_least(0), default=16, metavar="N",
                        help="tokens taken from the beginning of a prompt (default 16)")
    parser.add_argument("--batch", type=integer_at_least(1), default=64, metavar="N",
                        help="samples drawn together (default 64)")
    add_draw_flags(parser, temperature=1.0)
    add_seed_flag(parser)


def run(a: Arguments) -> dict[str, Any]:
    """Writes the samples; returns how many."""
    from dlm_jax.data.text import read_documents
    from dlm_jax.language_model import load
    from dlm_jax.sampling.settings import Settings
    prompts = read_documents(a.prompts) if a.prompts else ()
    draw = Settings(temperature=a.temperature, top_k=a.top_k, top_p=a.top_p, min_p=a.min_p, seed=a.seed)
    return write_samples(load(a.model), Path(a.out), a.documents, a.max_tokens, draw, prompts=prompts,
                         prompt_tokens=a.prompt_tokens, batch=a.batch)


def as_autoregressive(spec: DiffusionSpec) -> DiffusionSpec:
    """The spec of the same model, used left to right. Raises `UserError` where it cannot be."""
    if spec.is_diffusion and spec.clean_half != "token_causal":
        raise UserError(f"a model that denoises under the rule {spec.rule} does not write left to right; name the "
                        "autoregressive base")
    return spec.as_autoregressive()


def write_samples(lm: "LanguageModel", out: Path, documents: int, max_tokens: int, settings: "Settings", *,
                  prompts: Iterable[str] = (), prompt_tokens: int = 0, batch: int = 64,
                  progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Writes `documents` samples as JSON lines with a field `text`, for `dlm prepare`; returns what was written.

    Each sample starts afresh, or with the first `prompt_tokens` tokens of one of the `prompts`, taken in turn. Samples
    are drawn left to right with a KV cache, `batch` at a time. Sample i depends on the seed and on i alone.
    """
    from dlm_jax.sampling.requests import check_length, continuation
    check_new(out)
    check_length(max_tokens, lm.config.max_length)
    tokenizer = lm.text_tokenizer()
    starts = itertools.cycle([lm.encode(text)[:prompt_tokens + 1] for text in prompts] or [lm.encode("")])
    reader, lines, tokens = dataclasses.replace(lm, spec=as_autoregressive(lm.spec)), [], 0
    for first in range(0, documents, batch):
        numbers = range(first, min(first + batch, documents))
        requests = [continuation(start, max_tokens) for start in itertools.islice(starts, len(numbers))]
        for sample in reader.fill(requests, settings, numbers):
            lines.append(json.dumps({"text": tokenizer.decode(sample.tokens)}))
            tokens += sample.new_tokens
        progress(len(lines))
    write_text(out, "\n".join(lines) + "\n")
    return {"out": str(out), "documents": len(lines), "tokens": tokens}
