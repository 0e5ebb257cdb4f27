"""One run from its config: open the base, give it a mask token, open the data, train."""

import contextlib
import dataclasses
from pathlib import Path

from dlm_jax.cluster import leader_first, leads, meet
from dlm_jax.config import Config
from dlm_jax.convert.native import write_native
from dlm_jax.data.source import open_source, open_training
from dlm_jax.files import new_directory
from dlm_jax.opening import ADAPTED_BASE, open_bundle, open_tokenizer, with_mask
from dlm_jax.training.loop import Outcome, adapted_card, train
from dlm_jax.training.workdir import claimed


def adapt(config: Config, workdir: str | Path) -> Outcome:
    """Trains what `config` describes in `workdir`, or goes on with the run that is there.

    A run that fails before its first step leaves nothing behind. Raises `UserError` for everything in the config, the
    model or the data that does not fit together, and for a work directory that holds something else.
    """
    workdir = Path(workdir)
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
        return train(config, dataclasses.replace(bundle, card=card), training, validation, workdir)
