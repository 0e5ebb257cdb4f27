"""Text that an autoregressive base writes itself, to be trained on: short conversions keep closer to what it knows."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dlm_jax.errors import UserError
from dlm_jax.files import check_new, write_text
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.card import Card
from dlm_jax.sampling.requests import check_length, continuation
from dlm_jax.sampling.settings import Settings


def autoregressive(card: Card) -> Card:
    """The card of the same model, read left to right. Raises `UserError` where it cannot be."""
    if card.is_diffusion and card.clean_half != "token_causal":
        raise UserError(f"a model that denoises under the rule {card.rule} does not write left to right; name the "
                        "autoregressive base")
    return dataclasses.replace(card, rule="causal", alignment="shifted", block_size=None, clean_half="block_causal")


def write_samples(lm: LanguageModel, out: Path, documents: int, max_tokens: int, settings: Settings, *,
                  prompts: Iterable[str] = (), prompt_tokens: int = 0, batch: int = 64,
                  progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Writes `documents` samples as JSON lines with a field `text`, for `dlm prepare`; returns what was written.

    Each begins anew, or with the first `prompt_tokens` tokens of one of the `prompts`, taken in turn. They are drawn
    left to right, `batch` at a time, against a cache of keys and values. Sample i depends on the seed and i alone.
    """
    check_new(out)
    check_length(max_tokens, lm.config.max_length)
    tokenizer = lm.text_tokenizer()
    starts = itertools.cycle([lm.encode(text)[:prompt_tokens + 1] for text in prompts] or [lm.encode("")])
    reader, lines, tokens = dataclasses.replace(lm, card=autoregressive(lm.card)), [], 0
    for first in range(0, documents, batch):
        numbers = range(first, min(first + batch, documents))
        requests = [continuation(start, max_tokens) for start in itertools.islice(starts, len(numbers))]
        for sample in reader.fill(requests, settings, numbers):
            lines.append(json.dumps({"text": tokenizer.decode(sample.tokens)}))
            tokens += sample.new_tokens
        progress(len(lines))
    write_text(out, "\n".join(lines) + "\n")
    return {"out": str(out), "documents": len(lines), "tokens": tokens}
