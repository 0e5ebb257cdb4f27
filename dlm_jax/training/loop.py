"""The run: data, model, step, log, validation, checkpoints, in the order they happen."""

import contextlib
import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from dlm_jax.config import Config, build, to_json
from dlm_jax.data.dataset import Dataset
from dlm_jax.diffusion.recipes import Recipe
from dlm_jax.errors import UserError
from dlm_jax.evaluation.likelihood import AR, denoising_recipe, likelihood
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.weights import Params, init
from dlm_jax.training.checkpoint import Checkpoints, write_model_file
from dlm_jax.training.metrics import RunLog
from dlm_jax.training.progress import Progress
from dlm_jax.training.step import Metrics, State, init_state, make_step

# Keys that a restarted run may change: how long it goes on and what it says, not what it computes.
FREE_KEYS = ("checkpoint", "log", "evaluate")


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


def train(config: Config, bundle: Bundle, training: Dataset, validation: Dataset, workdir: Path) -> Outcome:
    """Trains `bundle` (with its mask token and final card) as `config` says, or goes on where the last run stopped.

    Everything a step computes is a function of the config and the step number, so a run that was killed and started
    again writes the same losses, bit for bit, on the same hardware.
    """
    started = time.perf_counter()
    for dataset in (training, validation):
        _check_length(dataset, bundle)
    _claim(workdir, config)
    write_model_file(workdir, bundle.config, bundle.card)

    params = bundle.params
    if config.model.init == "scratch":
        params = init(bundle.config, jax.random.key(config.train.seed))
    checkpoints = Checkpoints(workdir, config.checkpoint)
    state = checkpoints.restore(init_state(params, config, bundle.config))
    start = int(state.step)
    step = make_step(config, bundle.config, bundle.card.mask_token_id)
    validate = _validator(config, bundle, validation)

    with contextlib.ExitStack() as stack:
        stack.callback(checkpoints.close)
        log = RunLog(workdir, start)
        stack.callback(log.close)
        progress = stack.enter_context(Progress(config, start, training.length))
        batches = stack.enter_context(contextlib.closing(
            training.batches(config.train.batch, config.train.seed, start)))
        before = None if start else _record_validation(0, validate(state.params), log, progress)
        after = _steps(config, state, start, step, batches, validate, checkpoints, log, progress)
    if after is None:  # nothing was left to do
        after = validate(state.params)
    return Outcome(config.train.steps, before, after, time.perf_counter() - started)


def _steps(config: Config, state: State, start: int, step: Callable, batches: Iterator, validate: Callable,
           checkpoints: Checkpoints, log: RunLog, progress: Progress) -> float | None:
    """The loop itself. Metrics are read one step late, so that the device never waits for the host."""
    waiting: tuple[int, Metrics] | None = None
    after = None
    for number in range(start + 1, config.train.steps + 1):
        state, metrics = step(state, *next(batches))
        _write(waiting, log, progress)
        last = number == config.train.steps
        waiting = (number, metrics) if number % config.log.every == 0 or last else None
        progress.advance(number)
        if number % config.evaluate.every == 0 or last:
            _write(waiting, log, progress)  # waits for the step, whose time is training's and not validation's
            waiting = None
            with progress.pause():
                after = _record_validation(number, validate(state.params), log, progress)
        checkpoints.save(number, state, last)
    _write(waiting, log, progress)
    return after


def _write(waiting: tuple[int, Metrics] | None, log: RunLog, progress: Progress) -> None:
    """Logs the metrics of a finished step. Raises `UserError` where the loss is no number any more."""
    if waiting is None:
        return
    number, metrics = waiting
    values = {name: float(value) for name, value in metrics.items()}
    if not math.isfinite(values["loss"]):
        raise UserError(f"the loss is {values['loss']} at step {number}; lower optimizer.learning_rate or "
                        "optimizer.clip and start from the last checkpoint")
    values["tokens_per_second"] = progress.tokens_per_second()
    log.training(number, values)
    progress.report(number, values)


def _record_validation(number: int, nelbo: float, log: RunLog, progress: Progress) -> float:
    log.validation(number, {"nelbo": nelbo})
    progress.validated(number, nelbo)
    return nelbo


def _validator(config: Config, bundle: Bundle, dataset: Dataset) -> Callable[[Params], float]:
    """params -> nats a token on the validation records, always under the same noise."""
    tokens, segments = dataset.rows(slice(0, config.data.validation_records or None))
    rows = list(zip(np.asarray(tokens), np.asarray(segments)))
    exact = config.recipe.corruption == "none"
    recipe = AR if exact else denoising_recipe(bundle.card)
    samples = 1 if exact else config.evaluate.samples

    def validate(params: Params) -> float:
        return likelihood(params, bundle.config, recipe, bundle.card.mask_token_id, rows, samples).per_token

    return validate


def _check_length(dataset: Dataset, bundle: Bundle) -> None:
    if dataset.length > bundle.config.max_length:
        raise UserError(f"{dataset.directory} has records of {dataset.length} tokens and the model reads at most "
                        f"{bundle.config.max_length}; prepare the text with a smaller length")


def _claim(workdir: Path, config: Config) -> None:
    """Writes the config into the work directory, or refuses one that holds another run."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = workdir / "config.json"
        if file.exists():
            _check_same(build(Config, json.loads(file.read_text())), config, workdir)
        file.write_text(to_json(config) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {workdir}: {error.strerror or error}; free space or name a writable "
                        "place") from error


def _check_same(old: Config, new: Config, workdir: Path) -> None:
    for group in dataclasses.fields(Config):
        before, now = (dataclasses.asdict(getattr(c, group.name)) for c in (old, new))
        changed = [key for key in before if before[key] != now[key] and (group.name, key) != ("train", "steps")]
        if changed and group.name not in FREE_KEYS:
            raise UserError(f"{workdir} holds a run with {group.name}.{changed[0]} = {before[changed[0]]!r}, not "
                            f"{now[changed[0]]!r}; choose another work directory or the same config")
