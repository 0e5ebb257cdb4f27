"""Text that an autoregressive base writes itself, to be trained on: short conversions keep closer to what it knows."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax

from dlm_jax.errors import UserError
from dlm_jax.files import check_new, write_text
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.card import Card
from dlm_jax.sampling.generate import check_length, continuation, generate
from dlm_jax.sampling.proposal import Proposal
from dlm_jax.sampling.selector import Confidence


def autoregressive(card: Card) -> Card:
    """The card of the same model, read left to right. Raises `UserError` where it cannot be."""
    if card.rule in ("bidirectional", "block_causal"):
        raise UserError(f"a model that denoises under the rule {card.rule} does not write left to right; name the "
                        "autoregressive base")
    return dataclasses.replace(card, rule="causal", alignment="shifted", block_size=None)


def write_samples(lm: LanguageModel, out: Path, documents: int, max_tokens: int, proposal: Proposal, *,
                  prompts: Iterable[str] = (), prompt_tokens: int = 0, batch: int = 64, seed: int = 0,
                  progress: Callable[[int], None] = lambda done: None) -> dict[str, Any]:
    """Writes `documents` samples as JSON lines with a field `text`, for `dlm prepare`; returns what was written.

    Each begins anew, or with the first `prompt_tokens` tokens of one of the `prompts`, taken in turn. They are drawn
    left to right, `batch` at a time, against a cache of keys and values. Sample i depends on the seed, the batch and i.
    """
    check_new(out)
    check_length(max_tokens, lm.config)
    tokenizer = lm.text_tokenizer()
    starts = itertools.cycle([lm.encode(text)[:prompt_tokens + 1] for text in prompts] or [lm.encode("")])
    card, lines, tokens = autoregressive(lm.card), [], 0
    for first in range(0, documents, batch):
        requests = [continuation(start, max_tokens) for start in itertools.islice(starts, batch)]
        key = jax.random.fold_in(jax.random.key(seed), first)
        samples = generate(lm.params, lm.config, card, requests, proposal=proposal, select=Confidence(),
                           seed=int(jax.random.bits(key)))
        for sample in samples[:documents - first]:
            lines.append(json.dumps({"text": tokenizer.decode(sample.tokens)}))
            tokens += sample.new_tokens
        progress(len(lines))
    write_text(out, "\n".join(lines) + "\n")
    return {"out": str(out), "documents": len(lines), "tokens": tokens}
