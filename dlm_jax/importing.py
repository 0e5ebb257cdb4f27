"""`dlm import`: a Hugging Face checkpoint becomes a native model directory."""

import dataclasses
from pathlib import Path
from typing import Any

from dlm_jax.convert.directories import fetch
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.convert.peft import read_peft
from dlm_jax.diffusion.recipes import recipe
from dlm_jax.errors import UserError
from dlm_jax.files import check_new
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.lora import merge
from dlm_jax.models.weights import flatten, parameter_count, unflatten
from dlm_jax.opening import open_tokenizer, with_mask


def import_model(source: str, out: Path, mask: str | None = None, made_by: str | None = None,
                 dtype: str | None = None, adapter: str | None = None) -> dict[str, Any]:
    """Reads `source` (a directory or a hub id) strictly and writes it to the new directory `out`.

    mask: gives the model a mask token ('new', a token or an id). made_by: the recipe that made it a diffusion model,
    where its own files do not say so (DiffuLLaMA's look like a plain LLaMA). adapter: a directory of PEFT's whose
    adapters are merged into it. Returns what was read.
    """
    check_new(out)
    fetched = fetch(source)
    changes: dict[str, Any] = {"base_model": source if fetched.revision else fetched.directory.resolve().name,
                               "base_revision": fetched.revision}
    if made_by is not None:
        r = recipe(made_by)
        if mask is None:
            raise UserError(f"a model made by {made_by} has a mask token; name it with --mask")
        changes |= {"alignment": r.alignment, "rule": r.rule, "block_size": r.block_size or None, "recipe": r.name}
    bundle = read_hf(fetched.directory, dtype)
    if bundle.card.base_model is not None:  # an export knows where it came from better than its directory's name
        changes |= {"base_model": bundle.card.base_model, "base_revision": bundle.card.base_revision}
    bundle = dataclasses.replace(bundle, card=dataclasses.replace(bundle.card, **changes))
    tokenizer = open_tokenizer(bundle)
    if mask is not None:
        bundle, tokenizer = with_mask(bundle, tokenizer, mask)
    if adapter is not None:
        adapters, whole = read_peft(adapter, bundle.config)
        params = unflatten({**flatten(bundle.params), **flatten(whole)})
        bundle = dataclasses.replace(bundle, params=merge(params, adapters, scale=1.0))
    LanguageModel(bundle.config, bundle.params, bundle.card, tokenizer).save(out)
    c = bundle.card
    return {"out": str(out), "family": bundle.config.family, "parameters": parameter_count(bundle.config),
            "mask_token_id": c.mask_token_id, "alignment": c.alignment, "rule": c.rule, "block_size": c.block_size}
