"""One run from its config: open the base, give it a mask token, open the data, train."""

import contextlib
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from dlm_jax.cluster import leader_first, leads, meet
from dlm_jax.config import Config
from dlm_jax.convert.native import write_native
from dlm_jax.data.source import open_source, open_training
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import new_directory
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.weights import Params
from dlm_jax.opening import ADAPTED_BASE, open_bundle, open_tokenizer, with_mask
from dlm_jax.training.loop import Outcome, adapted_card, train
from dlm_jax.training.remote import mirrored
from dlm_jax.training.workdir import claimed


def adapt(config: Config, workdir: str | Path, profiled: tuple[int, int] | None = None) -> Outcome:
    """Trains what `config` describes in `workdir`, or goes on with the run that is there. profiled: the first and last
    step of a trace that is left in `workdir/profile`.

    A run that fails before its first step leaves nothing behind. Raises `UserError` for everything in the config, the
    model or the data that does not fit together, and for a work directory that holds something else.
    """
    with mirrored(workdir) as here:
        return _adapt(config, here, profiled)


def _adapt(config: Config, workdir: Path, profiled: tuple[int, int] | None) -> Outcome:
    """`adapt` in a directory of this machine."""
    with claimed(workdir, config) if leads() else contextlib.nullcontext():
        meet("claimed")
        bundle = open_bundle(config.model.base)
        tokenizer = open_tokenizer(bundle)
        if config.recipe.corruption != "none":
            bundle, tokenizer = with_mask(bundle, tokenizer, config.model.mask)
        with leader_first("data"):
            training = open_training(config.data.train, tokenizer, config.data.length, workdir / "data" / "train")
            validation = open_source(config.data.validation, "validation", tokenizer, training.length,
                                     workdir / "data" / "validation")
        if tokenizer is not None and leads():
            (workdir / "tokenizer").mkdir(exist_ok=True)
            tokenizer.save(workdir / "tokenizer")
        if config.lora.rank and leads() and not (workdir / ADAPTED_BASE).exists():
            with new_directory(workdir / ADAPTED_BASE) as partial:
                write_native(partial, bundle)
        base = Path(config.model.base)
        card = adapted_card(bundle.card, config.recipe, base.resolve().name if base.is_dir() else config.model.base)
        bundle = dataclasses.replace(bundle, card=card)
        texts = _texts(config, bundle, tokenizer) if config.evaluate.texts else None
        return train(config, bundle, training, validation, workdir, texts, profiled)


def _texts(config: Config, bundle: Bundle, tokenizer: Tokenizer | None) -> Callable[[Params], list[str]]:
    """Parameters -> `evaluate.texts` unconditional samples, made by one device from a copy of them."""
    if jax.process_count() > 1:
        raise UserError("evaluate.texts needs all parameters in one process; set it to 0 and sample from checkpoints")
    if tokenizer is None or config.recipe.corruption == "none":
        raise UserError("evaluate.texts needs a tokenizer and a recipe with corruption; set it to 0")

    def sample(params: Params) -> list[str]:
        lm = LanguageModel(bundle.config, params, bundle.card, tokenizer)
        drawn = lm.sample([""] * config.evaluate.texts, max_tokens=min(64, bundle.config.max_length // 2),
                          temperature=1.0)
        return [each.text for each in drawn]

    def texts(params: Params) -> list[str]:
        with ThreadPoolExecutor(1) as another:  # a thread of its own knows nothing of the mesh
            return another.submit(sample, jax.device_get(params)).result()

    return texts
