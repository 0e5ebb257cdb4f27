"""One run from its config: load the base, give it a mask token, open the data, train."""

import contextlib
import dataclasses
import functools
from pathlib import Path

import jax

from dlm_jax.config import Config
from dlm_jax.convert.native import write_native
from dlm_jax.convert.origin import origin_of, write_origin
from dlm_jax.data.source import load_source, load_training_data
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.files import new_directory, write_sums
from dlm_jax.language_model import LanguageModel
from dlm_jax.loading import ADAPTED_BASE, load_bundle, load_tokenizer, with_mask_token
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.lora import with_mask_adapters
from dlm_jax.models.weights import Params
from dlm_jax.parallel.distributed import barrier, is_primary, primary_first
from dlm_jax.parallel.mesh import outside_mesh
from dlm_jax.runs.remote import mirrored
from dlm_jax.runs.workdir import claimed
from dlm_jax.training.run import Outcome, SampleTexts, adapted_spec, train


def adapt(config: Config, workdir: str | Path, profile_steps: tuple[int, int] | None = None) -> Outcome:
    """Trains what `config` describes in `workdir`, or resumes the run that is there.

    profile_steps: the first and last step of a profile, written to `workdir/profile`. A run that fails before its first
    step leaves nothing behind. Raises `UserError` if anything in the config, the model or the data does not fit
    together, and if the work directory holds something else.
    """
    with mirrored(workdir) as local:
        return _adapt(config, local, profile_steps)


def _adapt(config: Config, workdir: Path, profile_steps: tuple[int, int] | None) -> Outcome:
    """`adapt` in a local directory."""
    with claimed(workdir, config) if is_primary() else contextlib.nullcontext():
        barrier("claimed")
        base = bundle = load_bundle(config.model.base)
        tokenizer = load_tokenizer(base)
        if config.recipe.masks:
            bundle, tokenizer = with_mask_token(base, tokenizer, config.model.mask)
        with primary_first("data"):
            training = load_training_data(config.data.train, tokenizer, config.data.seq_length,
                                          workdir / "data" / "train")
            validation = load_source(config.data.validation, "validation", tokenizer, training.length,
                                     workdir / "data" / "validation")
        if is_primary():
            _save_inputs(config, base, bundle, tokenizer, workdir)
        del base  # it holds an embedding of its own
        bundle = dataclasses.replace(bundle, spec=_spec(config, bundle.spec), config=with_mask_adapters(
            bundle.config, config.lora, bundle.spec.mask_token_id))
        sample_texts = _sample_texts(config, bundle, tokenizer) if config.evaluate.num_samples else None
        return train(config, bundle, training, validation, workdir, sample_texts, profile_steps, tokenizer)


def _save_inputs(config: Config, base: Bundle, bundle: Bundle, tokenizer: Tokenizer | None, workdir: Path) -> None:
    """Keeps what the trained weights need beside them: the tokenizer and, for adapters, `bundle`, which is the `base`
    with its mask token, and what the base is."""
    if tokenizer is not None:
        (workdir / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(workdir / "tokenizer")
        write_sums(workdir / "tokenizer")
    if config.lora.rank and not (workdir / ADAPTED_BASE).exists():
        with new_directory(workdir / ADAPTED_BASE) as partial:
            write_native(partial, bundle)
            mask = config.model.mask if config.recipe.masks else None
            write_origin(partial, origin_of(base, config.model.base, mask))


def _spec(config: Config, spec: DiffusionSpec) -> DiffusionSpec:
    """The spec of the trained model; a base in a local directory is named by the directory's last part."""
    base = Path(config.model.base)
    return adapted_spec(spec, config.recipe, base.resolve().name if base.is_dir() else config.model.base)


def _sample_texts(config: Config, bundle: Bundle, tokenizer: Tokenizer | None) -> SampleTexts:
    """A function from parameters to `evaluate.num_samples` unconditional samples, drawn on one device from a copy."""
    if jax.process_count() > 1:
        raise UserError("evaluate.num_samples needs all parameters in one process; set it to 0 and sample from "
                        "checkpoints")
    if tokenizer is None or not config.recipe.masks:
        raise UserError("evaluate.num_samples needs a tokenizer and a recipe with corruption; set it to 0")

    def sample(params: Params) -> list[str]:
        lm = LanguageModel(bundle.config, params, bundle.spec, tokenizer)
        samples = lm.sample([""] * config.evaluate.num_samples, max_tokens=min(64, bundle.config.max_length // 2),
                            temperature=1.0)
        return [each.text for each in samples]

    return functools.partial(outside_mesh, sample)
