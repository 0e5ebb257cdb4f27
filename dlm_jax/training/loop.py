"""The run: data, model, step, log, validation, checkpoints, in the order they happen."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
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
from dlm_jax.mesh import make_mesh, own_share, whole_batch
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.weights import init
from dlm_jax.training.checkpoint import Checkpoints, write_model_file
from dlm_jax.training.metrics import NoLog, RunLog
from dlm_jax.training.progress import Progress
from dlm_jax.training.step import Metrics, State, check_shares, init_state, make_step, model_params


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a run came to. nelbo_before is None where it was resumed; nats a token on the validation text."""

    steps: int
    nelbo_before: float | None
    nelbo_after: float
    seconds: float


def adapted_card(card: Card, recipe: Recipe, base: str) -> Card:
    """The card of a model that was trained by `recipe` from the model named `base`."""
    return dataclasses.replace(card, alignment=recipe.alignment, rule=recipe.rule, block_size=recipe.block_size or None,
                               recipe=recipe.name, base_model=card.base_model or base)


def train(config: Config, bundle: Bundle, training: Dataset | Mixture, validation: Dataset, workdir: Path) -> Outcome:
    """Trains `bundle` (with its mask token and final card) as `config` says, or goes on where the last run stopped.

    Everything a step computes is a function of the config and the step number, so a run that was killed and started
    again writes the same losses, bit for bit, on the same hardware.
    """
    started = time.perf_counter()
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
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir, config.checkpoint)))
        state = checkpoints.restore(init_state(params, config, bundle.config))
        start = int(state.step)
        validate = _validator(config, bundle, validation)
        progress = stack.enter_context(Progress(config, start, training.length))
        if start == config.train.steps:
            progress.say(f"{workdir} is finished at step {start}; give a larger train.steps to go on")
            return Outcome(start, None, validate(state), time.perf_counter() - started)
        log = stack.enter_context(contextlib.closing(RunLog(workdir, start) if leads() else NoLog()))
        before = None if start else _record_validation(0, validate(state), log, progress)
        step_at = _compiled_steps(config, bundle, state, training.length)
        step_at(start)  # before the clock of the training starts
        batches = stack.enter_context(contextlib.closing(
            training.batches(config.train.batch, config.train.seed, start, own_share(config.train.batch))))
        progress.begin()
        after = _steps(config, state, start, step_at, batches, validate, checkpoints, log, progress)
    return Outcome(config.train.steps, before, after, time.perf_counter() - started)


def _compiled_steps(config: Config, bundle: Bundle, state: State, length: int) -> Callable[[int], Callable]:
    """number -> the step that begins with `number` done; compiled once for each size of block that the recipe has."""
    batch = config.train.batch
    rows = whole_batch(np.zeros((batch // own_share(batch)[1], length), np.int32), batch)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    @functools.cache
    def compiled(recipe: Recipe) -> Callable:
        step: Any = make_step(dataclasses.replace(config, recipe=recipe), bundle.config, bundle.card.mask_token_id)
        return step.lower(abstract, rows, rows).compile()

    return lambda number: compiled(recipe_at(config.recipe, number, length))


def _steps(config: Config, state: State, start: int, step_at: Callable[[int], Callable], batches: Iterator,
           validate: Callable, checkpoints: Checkpoints, log: NoLog, progress: Progress) -> float:
    """The loop itself. Metrics are read one step late, so that the device never waits for the host; but validation and
    checkpoints never run ahead of the log, so that a run that is killed after them has lost no line."""
    waiting: tuple[int, Metrics] | None = None
    after = math.nan
    for number in range(start + 1, config.train.steps + 1):
        state, metrics = step_at(number - 1)(state, *(whole_batch(rows, config.train.batch) for rows in next(batches)))
        _write(waiting, log, progress)
        last = number == config.train.steps
        waiting = (number, metrics) if number % config.log.every == 0 or last else None
        progress.advance(number)
        validates, saves = (number % every == 0 or last for every in (config.evaluate.every, config.checkpoint.every))
        if validates or saves:
            _write(waiting, log, progress)
            waiting = None
        if validates:
            with progress.pause():
                after = _record_validation(number, validate(state), log, progress)
        if saves:
            _finite(number, metrics)
            checkpoints.save(number, state)
    return after


def _write(waiting: tuple[int, Metrics] | None, log: NoLog, progress: Progress) -> None:
    """Logs the metrics of a step."""
    if waiting is None:
        return
    number, metrics = waiting
    values = {**_finite(number, metrics), "tokens_per_second": progress.tokens_per_second()}
    log.training(number, values)
    progress.report(number, values)


def _finite(number: int, metrics: Metrics) -> dict[str, float]:
    """The metrics of a step, waited for. Raises `UserError` where they are no numbers any more."""
    values = {name: float(value) for name, value in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{name} is {value} at step {number}; start anew in another work directory with a lower "
                            "optimizer.learning_rate or optimizer.clip")
    return values


def _record_validation(number: int, nelbo: float, log: NoLog, progress: Progress) -> float:
    log.validation(number, {"nelbo": nelbo})
    progress.validated(number, nelbo)
    return nelbo


def _validator(config: Config, bundle: Bundle, dataset: Dataset) -> Callable[[State], float]:
    """state -> nats a token on the validation records, always under the same noise."""
    tokens, segments = dataset.rows(slice(0, config.data.validation_records or None))
    rows = list(zip(np.asarray(tokens), np.asarray(segments)))
    exact = config.recipe.corruption == "none"
    recipe = AR if exact else denoising_recipe(bundle.card)
    samples = 1 if exact else config.evaluate.samples

    def validate(state: State) -> float:
        params = model_params(state, config.lora, bundle.config)
        return float(likelihood(params, bundle.config, recipe, bundle.card.mask_token_id, rows, samples))

    return validate


def _check_length(dataset: Dataset | Mixture, bundle: Bundle) -> None:
    if dataset.length > bundle.config.max_length:
        raise UserError(f"{dataset.directory} has records of {dataset.length} tokens and the model reads at most "
                        f"{bundle.config.max_length}; prepare the text with a smaller length")
