"""Loads a model by name: a native, work or Hugging Face directory, a hub id, or the base bundled with the package."""

import dataclasses
from pathlib import Path

from dlm_jax.convert.hf_import import read_hf
from dlm_jax.convert.hub import fetch
from dlm_jax.convert.native import read_native
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import is_remote
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.mask_token import add_mask_row, reuse_mask_row

BUNDLED = "bundled"
ADAPTED_BASE = "base"  # in the work directory of a LoRA run: the model that its adapters are added to
BUNDLED_DIRECTORY = Path(__file__).parent / "assets" / "base"


def load_bundle(source: str | Path) -> Bundle:
    """The model called `source`: see the top of this file. One from the hub records its id and commit in its spec.

    Raises `UserError` if there is no such model, or it is incomplete or damaged.
    """
    if is_remote(source):
        from dlm_jax.runs.remote import fetch as fetch_run
        return read_run(fetch_run(str(source)))
    path = BUNDLED_DIRECTORY if str(source) == BUNDLED else Path(source)
    if (path / "dlm.json").is_file():
        return read_native(path)
    if (path / "model.json").is_file() and (path / "checkpoints").is_dir():
        return read_run(path)
    fetched = fetch(path if path.is_dir() else str(source))
    bundle = read_hf(fetched.directory)
    if fetched.revision is None or bundle.spec.base_model is not None:
        return bundle
    spec = dataclasses.replace(bundle.spec, base_model=str(source), base_revision=fetched.revision)
    return dataclasses.replace(bundle, spec=spec)


def read_run(workdir: Path) -> Bundle:
    """The model of a work directory, with adapters merged into the base that is stored there."""
    from dlm_jax.runs.read import read_work_directory  # Orbax is slow to import
    base = workdir / ADAPTED_BASE
    return read_work_directory(workdir, read_native(base).params if base.is_dir() else None)


def load_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The tokenizer beside the model, with the model's own start and end tokens; None if there are no files.

    Raises `UserError` for a tokenizer with ids for which the model has no row: JAX would read them as NaN.
    """
    if bundle.tokenizer_dir is None:
        return None
    tokenizer = Tokenizer.load(bundle.tokenizer_dir, bundle.spec.start_id, bundle.spec.eos_token_id)
    mask_id = bundle.spec.mask_token_id
    if mask_id is not None and tokenizer.mask_id is None and mask_id == tokenizer.size:
        tokenizer = tokenizer.with_mask(id=mask_id)
    if tokenizer.largest_id >= bundle.config.vocab_size:
        raise UserError(f"the tokenizer in {bundle.tokenizer_dir} has ids up to {tokenizer.largest_id} and the model "
                        f"has only {bundle.config.vocab_size} rows; use the tokenizer that belongs to the model")
    return tokenizer


def with_mask_token(bundle: Bundle, tokenizer: Tokenizer | None, mask: str) -> tuple[Bundle, Tokenizer | None]:
    """Model and tokenizer with a mask token.

    mask: 'new' adds an embedding row at the mean of the others, unless the model already has a mask token; the text or
    the id of a token reuses its row.
    Raises `UserError` if `mask` is not exactly one token, or the model cannot use it.
    """
    if mask == "new":
        if bundle.spec.mask_token_id is not None:
            return bundle, tokenizer
        if tokenizer is None:
            return add_mask_row(bundle), None
        return add_mask_row(bundle, tokenizer.size), tokenizer.with_mask(id=tokenizer.size)
    if mask.isdecimal():
        return reuse_mask_row(bundle, int(mask)), tokenizer
    if tokenizer is None:
        raise UserError(f"the mask token '{mask}' is text and the model has no tokenizer; give its id or 'new'")
    ids = tokenizer.encode(mask)
    if len(ids) != 1:
        raise UserError(f"the mask token '{mask}' is not one token of this tokenizer but {len(ids)}; give another, an "
                        "id, or 'new'")
    return reuse_mask_row(bundle, ids[0]), tokenizer
