"""From a name to a model: a native, work or Hugging Face directory, a hub id, or the base that the package carries."""

import dataclasses
from pathlib import Path

from dlm_jax.convert.directories import fetch
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.convert.native import read_native
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import is_remote
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.mask_token import add_mask_row, reuse_mask_row

BUNDLED = "bundled"
BUNDLED_DIRECTORY = Path(__file__).parent / "assets" / "base"


def open_bundle(source: str | Path) -> Bundle:
    """The model of that name. What came from the hub says so in its card. Raises `UserError` with the cause."""
    if is_remote(source):
        from dlm_jax.training.checkpoint import read_work_directory
        from dlm_jax.training.remote import fetch as fetch_run
        return read_work_directory(fetch_run(str(source)))
    path = BUNDLED_DIRECTORY if str(source) == BUNDLED else Path(source)
    if (path / "dlm.json").is_file():
        return read_native(path)
    if (path / "model.json").is_file() and (path / "checkpoints").is_dir():
        from dlm_jax.training.checkpoint import read_work_directory  # Orbax is slow to import
        return read_work_directory(path)
    fetched = fetch(path if path.is_dir() else str(source))
    bundle = read_hf(fetched.directory)
    if fetched.revision is None or bundle.card.base_model is not None:
        return bundle
    card = dataclasses.replace(bundle.card, base_model=str(source), base_revision=fetched.revision)
    return dataclasses.replace(bundle, card=card)


def open_tokenizer(bundle: Bundle) -> Tokenizer | None:
    """The tokenizer that lies beside the model, with the model's own start and end tokens; None where there is none."""
    if bundle.tokenizer_dir is None:
        return None
    tokenizer = Tokenizer.load(bundle.tokenizer_dir, bundle.card.start_id, bundle.card.eos_token_id)
    mask_id = bundle.card.mask_token_id
    if mask_id is not None and tokenizer.mask_id is None and mask_id == tokenizer.size:
        return tokenizer.with_mask(id=mask_id)
    return tokenizer


def with_mask(bundle: Bundle, tokenizer: Tokenizer | None, mask: str) -> tuple[Bundle, Tokenizer | None]:
    """Model and tokenizer with a mask token: 'new' adds a row at the mean of the others unless there is a mask token
    already; a number or a token reuses that row."""
    if mask == "new":
        if bundle.card.mask_token_id is not None:
            return bundle, tokenizer
        if tokenizer is None:
            return add_mask_row(bundle), None
        return add_mask_row(bundle, tokenizer.size), tokenizer.with_mask(id=tokenizer.size)
    if mask.isdecimal():
        return reuse_mask_row(bundle, int(mask)), tokenizer
    if tokenizer is None:
        raise UserError(f"the mask token '{mask}' is a text and the model has no tokenizer; name its id or 'new'")
    ids = tokenizer.encode(mask)
    if len(ids) != 1:
        raise UserError(f"the mask token '{mask}' is not one token of this tokenizer but {len(ids)}; name another, an "
                        "id, or 'new'")
    return reuse_mask_row(bundle, ids[0]), tokenizer
