"""Giving a model its mask token: a new row of the embedding (and of an untied head), or an existing one."""

import dataclasses

import numpy as np

from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.typing import Array, Shaped


def add_mask_row(bundle: Bundle, known_ids: int | None = None) -> Bundle:
    """The bundle with a new mask token whose rows are the mean of the known tokens' rows.

    known_ids: the number of ids that represent text; None means all rows do. Where the table has spare rows beyond
    them (a padded vocabulary), the first spare row becomes the mask; otherwise the vocabulary grows by one. Raises
    `UserError` where the tokenizer has more ids than the model has rows.
    """
    vocab = bundle.config.vocab_size
    known = vocab if known_ids is None else known_ids
    if known > vocab:
        raise UserError(f"the tokenizer knows {known} ids but the model has only {vocab} rows; use the tokenizer that "
                        "belongs to the model")
    params = dict(bundle.params)
    params["embed"] = dict(params["embed"], tokens=_with_mean_row(params["embed"]["tokens"], known))
    if "head" in params:
        params["head"] = dict(params["head"], weight=_with_mean_row(params["head"]["weight"].T, known).T)
    config = dataclasses.replace(bundle.config, vocab_size=max(vocab, known + 1))
    return dataclasses.replace(bundle, params=params, config=config,
                               spec=dataclasses.replace(bundle.spec, mask_token_id=known))


def reuse_mask_row(bundle: Bundle, mask_id: int) -> Bundle:
    """The bundle with an existing id as its mask token. Raises `UserError` for an id that cannot be one."""
    if not 0 <= mask_id < bundle.config.vocab_size:
        raise UserError(f"the mask token id {mask_id} is not in the vocabulary of {bundle.config.vocab_size}; name one "
                        "that is, or 'new'")
    spec = bundle.spec
    if mask_id in (spec.bos_token_id, spec.eos_token_id):
        raise UserError(f"the id {mask_id} starts or ends a text and cannot be its mask token too; name another, or "
                        "'new'")
    if spec.mask_token_id not in (None, mask_id):
        raise UserError(f"the model's mask token is {spec.mask_token_id} already and cannot become {mask_id}; leave "
                        "the mask out, or give 'new' to keep it")
    return dataclasses.replace(bundle, spec=dataclasses.replace(spec, mask_token_id=mask_id))


def _with_mean_row(table: Shaped[Array, "v d"], known: int) -> Shaped[np.ndarray, "_ d"]:
    """`table` with the mean of its first `known` rows as row `known`, in the table's dtype."""
    table = np.asarray(table)
    mean = table[:known].astype(np.float32).mean(0).astype(table.dtype)
    return np.concatenate([table[:known], mean[None], table[known + 1:]])
