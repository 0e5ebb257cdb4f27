"""The run: data, model, step, log, validation, checkpoints, in the order they happen."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dlm_jax.cluster import leads
from dlm_jax.config import Config
from dlm_jax.data.dataset import Dataset
from dlm_jax.data.mixture import Mixture
from dlm_jax.diffusion.recipe import Recipe, recipe_at
from dlm_jax.errors import UserError
from dlm_jax.evaluation.likelihood import AR, denoising_recipe, likelihood
from dlm_jax.hardware import peak_of
from dlm_jax.mesh import make_mesh, own_share, whole_batch
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params, init
from dlm_jax.training.checkpoint import Checkpoints, model_fields, write_model_file
from dlm_jax.training.clock import Clock
from dlm_jax.training.cost import step_flops
from dlm_jax.training.metrics import NoLog, RunLog
from dlm_jax.training.progress import Progress
from dlm_jax.training.remote import push
from dlm_jax.training.step import State, check_shares, init_state, make_step, model_params
from dlm_jax.training.steps import Steps
from dlm_jax.training.watch import Trace, termination, watchdog


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to. nelbo_before is None where it was resumed; nats a token on the validation text; seconds of
    this process, and the share of them that went into steps (goodput); how many steps were skipped."""

    steps: int
    nelbo_before: float | None
    nelbo_after: float
    seconds: float
    goodput: float = 0.0
    skipped: int = 0


def adapted_card(card: Card, recipe: Recipe, base: str) -> Card:
    """The card of a model that was trained by `recipe` from the model named `base`."""
    return dataclasses.replace(card, alignment=recipe.alignment, rule=recipe.rule, block_size=recipe.block_size or None,
                               clean_half=recipe.clean_half, recipe=recipe.name, base_model=card.base_model or base)


def train(config: Config, bundle: Bundle, training: Dataset | Mixture, validation: Dataset, workdir: Path,
          texts: Callable[[Params], list[str]] | None = None, profiled: tuple[int, int] | None = None) -> Outcome:
    """Trains `bundle` (with its mask token and final card) as `config` says, or goes on where the last run stopped.

    Everything a step computes is a function of the config and the step number, so a run that was killed and started
    again writes the same losses, bit for bit, on the same hardware. texts: parameters -> samples, shown at validations;
    profiled: first and last step of a trace.
    """
    clock = Clock()
    for dataset in (training, validation):
        _check_length(dataset, bundle)
    shape = config.mesh
    mesh = make_mesh(shape.replica, shape.fsdp, shape.tensor)
    if leads():
        write_model_file(workdir, bundle.config, bundle.card, config.lora)
    params = bundle.params
    if config.model.init == "scratch":
        params = init(bundle.config, jax.random.key(config.train.seed))

    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        check_shares(config.train)
        about = {"config": dataclasses.asdict(config), "model": model_fields(bundle.config, bundle.card, config.lora)}
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.checkpoint, about)))
        progress = stack.enter_context(Progress(config))
        state = checkpoints.restore(init_state(params, config, bundle.config), progress.say)
        start = int(state.step)
        progress.begin(start)
        validate = _validator(config, bundle, validation)
        whole = functools.partial(model_params, lora=config.lora, model=bundle.config)
        if start == config.train.steps:
            progress.say(f"{workdir} is finished at step {start}; give a larger train.steps to go on")
            return Outcome(start, None, validate(whole(state)), clock.elapsed())
        log = stack.enter_context(contextlib.closing(RunLog(workdir, start, config) if leads() else NoLog()))
        batches = stack.enter_context(contextlib.closing(
            training.batches(config.train.batch, config.train.seed, start, own_share(config.train.batch))))
        trace = Trace(workdir / "profile", *profiled) if profiled else None
        if trace:
            stack.callback(trace.close)
        steps = Steps(
            config=config, step_at=_compiled_steps(config, bundle, state, training), batches=batches,
            sources=functools.partial(_sources, config, training),
            whole=whole, validate=validate, texts=texts, speed=_speed(config, bundle.config, training.length),
            ends=stack.enter_context(termination()), alive=stack.enter_context(watchdog(config.log.stall)), trace=trace,
            checkpoints=checkpoints, saved=functools.partial(push, workdir), log=log, progress=progress, clock=clock)
        before = None if start else steps.validated(0, whole(state))
        after = steps.run(state)
    return Outcome(config.train.steps, before, after, clock.elapsed(), clock.goodput(), steps.skipped)


def _sources(config: Config, training: Dataset | Mixture, number: int) -> tuple[np.ndarray, ...]:
    """Which source each record of this process in batch `number` (from 0) is from, where there are several."""
    if len(training.names) == 1:
        return ()
    return (training.sources(config.train.batch, number, own_share(config.train.batch)),)


def _compiled_steps(config: Config, bundle: Bundle, state: State, training: Dataset | Mixture
                    ) -> Callable[[int], Callable]:
    """number -> the step that begins with `number` done; compiled once for each size of block that the recipe has, the
    first before the clock of the training starts."""
    batch, length = config.train.batch, training.length
    records = np.zeros((batch // own_share(batch)[1], length), np.int32)
    rows = [whole_batch(part, batch) for part in (records, records, *_sources(config, training, 0))]
    names = training.names if len(training.names) > 1 else ()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    @functools.cache
    def compiled(recipe: Recipe) -> Callable:
        step: Any = make_step(dataclasses.replace(config, recipe=recipe), bundle.config, bundle.card.mask_token_id,
                              names)
        return step.lower(abstract, *rows).compile()

    compiled(recipe_at(config.recipe, int(state.step), length))
    return lambda number: compiled(recipe_at(config.recipe, number, length))


def _speed(config: Config, model: ModelConfig, length: int) -> Callable[[float], dict[str, float]]:
    """Seconds a step -> tokens a second, and where the peak of the devices is known the share of it that is used (MFU):
    `step_flops`, which counts visible pairs and nothing twice, over what all devices could do in that time."""
    flops = step_flops(model, config.recipe, config.train.batch, length)
    peak = peak_of(jax.devices()[0].device_kind)

    def speed(seconds: float) -> dict[str, float]:
        mfu = {"mfu": flops / seconds / (peak.flops * jax.device_count())} if peak else {}
        return {"tokens_per_second": config.train.batch * length / seconds, **mfu}

    return speed


def _validator(config: Config, bundle: Bundle, dataset: Dataset) -> Callable[[Params], float]:
    """params -> nats a token on the validation records, always under the same noise."""
    tokens, segments = dataset.rows(slice(0, config.data.validation_records or None))
    rows = list(zip(np.asarray(tokens), np.asarray(segments)))
    exact = config.recipe.corruption == "none"
    recipe = AR if exact else denoising_recipe(bundle.card)
    samples = 1 if exact else config.evaluate.samples

    def validate(params: Params) -> float:
        return float(likelihood(params, bundle.config, recipe, bundle.card.mask_token_id, rows, samples))

    return validate


def _check_length(dataset: Dataset | Mixture, bundle: Bundle) -> None:
    if dataset.length > bundle.config.max_length:
        raise UserError(f"{dataset.directory} has records of {dataset.length} tokens and the model reads at most "
                        f"{bundle.config.max_length}; prepare the text with a smaller length")
