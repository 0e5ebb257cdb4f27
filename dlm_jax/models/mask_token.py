"""Giving a model its mask token: a new row of the embedding (and of an untied head), or one that is there."""

import dataclasses
from typing import Any

import numpy as np

from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle


def add_mask_row(bundle: Bundle, known_ids: int | None = None) -> Bundle:
    """The bundle with a new mask token whose rows are the mean of the known tokens' rows.

    known_ids: how many ids have a text. Where the table has spare rows beyond them (a padded vocabulary), the first
    spare row becomes the mask; otherwise the vocabulary grows by one. None: all rows are known.
    """
    vocab = bundle.config.vocab_size
    known = vocab if known_ids is None else known_ids
    if known > vocab:
        raise UserError(f"the tokenizer knows {known} ids and the model has only {vocab} rows; use the tokenizer that "
                        "belongs to the model")
    params = dict(bundle.params)
    params["embed"] = dict(params["embed"], tokens=_with_mean_row(params["embed"]["tokens"], known))
    if "head" in params:
        params["head"] = dict(params["head"], weight=_with_mean_row(params["head"]["weight"].T, known).T)
    config = dataclasses.replace(bundle.config, vocab_size=max(vocab, known + 1))
    return dataclasses.replace(bundle, params=params, config=config,
                               card=dataclasses.replace(bundle.card, mask_token_id=known))


def reuse_mask_row(bundle: Bundle, mask_id: int) -> Bundle:
    """The bundle with an existing id as its mask token."""
    if not 0 <= mask_id < bundle.config.vocab_size:
        raise UserError(f"the mask token id {mask_id} is not in the vocabulary of {bundle.config.vocab_size}; name one "
                        "that is, or 'new'")
    card = bundle.card
    if mask_id in (card.bos_token_id, card.eos_token_id):
        raise UserError(f"the id {mask_id} starts or ends a text and cannot be its mask token too; name another, or "
                        "'new'")
    if card.mask_token_id not in (None, mask_id):
        raise UserError(f"the model's mask token is {card.mask_token_id} already and cannot become {mask_id}; leave "
                        "the mask out, or say 'new' to keep it")
    return dataclasses.replace(bundle, card=dataclasses.replace(card, mask_token_id=mask_id))


def _with_mean_row(table: Any, known: int) -> np.ndarray:
    """`table` [v, d] whose row `known` is the mean of the rows before it, in the table's dtype."""
    table = np.asarray(table)
    mean = table[:known].astype(np.float32).mean(0).astype(table.dtype)
    return np.concatenate([table[:known], mean[None], table[known + 1:]])
