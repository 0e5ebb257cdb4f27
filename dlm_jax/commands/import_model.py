"""`dlm import`: a Hugging Face checkpoint becomes a native model directory."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from dlm_jax.commands.arguments import Arguments
from dlm_jax.errors import UserError
from dlm_jax.files import check_new


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm import`."""
    parser.add_argument("source", help="directory or hub id")
    parser.add_argument("--out", required=True, help="new directory")
    parser.add_argument("--mask", help="mask token: 'new' for a new row, or an existing token or id")
    parser.add_argument("--recipe", help="recipe that it was adapted with, if its files do not state it")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="dtype of the weights (default: as stored)")
    parser.add_argument("--adapter", metavar="DIR", help="PEFT directory whose LoRA adapters are merged into the model")


def run(a: Arguments) -> dict[str, Any]:
    """Imports; returns what was read."""
    return import_model(a.source, Path(a.out), a.mask, a.recipe, a.dtype, a.adapter)


def import_model(source: str, out: Path, mask: str | None = None, recipe: str | None = None,
                 dtype: str | None = None, adapter: str | None = None) -> dict[str, Any]:
    """Reads `source`, a directory or hub id, strictly and writes it to the new directory `out`; returns what was read.

    mask: gives the model a mask token ('new', a token or an id). recipe: the recipe that it was adapted with, if
    its own files do not state it (DiffuLLaMA's look like a plain LLaMA). adapter: a PEFT directory whose adapters
    are merged into the model. Raises `UserError` for whatever does not fit together.
    """
    from dlm_jax.convert.hf_import import read_hf
    from dlm_jax.convert.hub import fetch
    from dlm_jax.convert.origin import weights_sha256
    from dlm_jax.convert.peft import check_base
    from dlm_jax.language_model import LanguageModel
    from dlm_jax.loading import load_tokenizer, with_mask_token
    from dlm_jax.models.weights import parameter_count
    check_new(out)
    fetched = fetch(source)
    changes: dict[str, Any] = {"base_model": source if fetched.revision else fetched.directory.resolve().name,
                               "base_revision": fetched.revision}
    if recipe is not None:
        changes |= spec_of_recipe(recipe, mask)
    bundle = read_hf(fetched.directory, dtype if adapter is None else None)  # with adapters, rounded once merged
    if bundle.spec.base_model is not None:  # an export records its origin, which its directory's name may not
        changes |= {"base_model": bundle.spec.base_model, "base_revision": bundle.spec.base_revision}
    bundle = dataclasses.replace(bundle, spec=dataclasses.replace(bundle.spec, **changes))
    tokenizer = load_tokenizer(bundle)
    if adapter is not None:
        check_base(adapter, source, weights_sha256(bundle))
    if mask is not None:
        bundle, tokenizer = with_mask_token(bundle, tokenizer, mask)
    if adapter is not None:
        bundle = with_adapter(bundle, adapter, dtype)
    LanguageModel(bundle.config, bundle.params, bundle.spec, tokenizer).save(out)
    s = bundle.spec
    return {"out": str(out), "family": bundle.config.family, "parameters": parameter_count(bundle.config),
            "mask_token_id": s.mask_token_id, "alignment": s.alignment, "rule": s.rule, "block_size": s.block_size}


def spec_of_recipe(name: str, mask: str | None) -> dict[str, Any]:
    """The fields of `DiffusionSpec` that a recipe determines."""
    from dlm_jax.diffusion.recipes import recipe
    r = recipe(name)
    if mask is None:
        raise UserError(f"a model adapted with {name} has a mask token; name it with --mask")
    return {"alignment": r.alignment, "rule": r.rule, "block_size": r.block_size or None, "recipe": r.name}


def with_adapter(bundle: Any, adapter: str, dtype: str | None) -> Any:
    """The bundle with the adapters, and the modules trained in full, of a PEFT directory, then rounded to `dtype`."""
    import jax
    import numpy as np

    from dlm_jax.convert.peft import read_peft
    from dlm_jax.models.lora import merge
    from dlm_jax.models.weights import flatten, unflatten
    adapters, trained_in_full = read_peft(adapter, bundle.config)
    params = unflatten({**flatten(bundle.params), **flatten(trained_in_full)})
    merged = merge(params, adapters, scale=1.0)
    if dtype is not None:
        merged = jax.tree.map(lambda weight: np.asarray(weight).astype(np.dtype(dtype)), merged)
    return dataclasses.replace(bundle, params=merged)
