"""A training run: sets up model, data, step, log and checkpoints, and hands them to the loop."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from dlm_jax.config import Config
from dlm_jax.data.dataset import Dataset
from dlm_jax.data.mixture import Mixture
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.diffusion.recipe import Recipe, recipe_at
from dlm_jax.errors import UserError
from dlm_jax.evaluation.log_likelihood import AR, denoising_recipe, likelihood
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import Params, init
from dlm_jax.parallel.distributed import is_primary
from dlm_jax.parallel.mesh import make_mesh
from dlm_jax.runs.read import model_fields, write_model_file
from dlm_jax.training.batches import Batch, device_batches, example_batch
from dlm_jax.training.checkpoint import Checkpoints
from dlm_jax.training.flops import throughput
from dlm_jax.training.goodput import GoodputClock
from dlm_jax.training.loop import Run, train_loop
from dlm_jax.training.metrics import NoLog, RunLog
from dlm_jax.training.profile import Profile
from dlm_jax.training.progress import ProgressBar
from dlm_jax.training.recorder import Recorder
from dlm_jax.training.rollouts import Rollouts, check_rollouts, example_rollouts
from dlm_jax.training.saver import Saver
from dlm_jax.training.step import TrainState, check_mesh_divides, init_state, make_step, model_params
from dlm_jax.training.watchdog import stop_request, watchdog

SampleTexts = Callable[[Params], list[str]]  # parameters -> texts that the model writes


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a run."""

    steps: int  # steps done, those before it was resumed included
    nelbo_before: float | None  # validation NELBO before the first step, nats per token; None if the run was resumed
    nelbo_after: float  # validation NELBO after the last step, nats per token
    seconds: float  # of this process
    goodput: float = 0.0  # the fraction of them that went into steps
    skipped: int = 0  # steps skipped for a non-finite loss or gradient


def adapted_spec(spec: DiffusionSpec, recipe: Recipe, base: str) -> DiffusionSpec:
    """The spec of a model that was trained by `recipe` from the model named `base`."""
    trained = dataclasses.replace(spec, recipe=recipe.name, base_model=spec.base_model or base)
    if not recipe.masks:
        return trained.as_autoregressive()
    return dataclasses.replace(trained, alignment=recipe.alignment, rule=recipe.rule, clean_half=recipe.clean_half,
                               block_size=recipe.block_size or None)


def train(config: Config, bundle: Bundle, training: Dataset | Mixture, validation: Dataset, workdir: Path,
          sample_texts: SampleTexts | None = None, profile_steps: tuple[int, int] | None = None,
          tokenizer: Tokenizer | None = None) -> Outcome:
    """Trains `bundle` (with its mask token and final spec) as `config` says, or resumes the run in `workdir`.

    Everything a step computes is a function of the config and the step number, so a run that was killed and resumed
    logs the same losses, bit for bit, on the same hardware. sample_texts: called at every validation; profile_steps:
    the first and last step to profile; tokenizer: what reads answers as text, where a reward trains.
    """
    clock = GoodputClock()
    for dataset in (training, validation):
        _check_length(dataset, bundle)
    if config.reinforce.reward:
        check_rollouts(config, training, tokenizer)
    mesh = make_mesh(**dataclasses.asdict(config.mesh))
    about = model_fields(bundle.config, bundle.spec, config.lora)
    if is_primary():
        write_model_file(workdir, bundle.config, bundle.spec, config.lora)
    params = bundle.params
    if config.model.init == "scratch":
        params = init(bundle.config, jax.random.key(config.train.seed))

    with contextlib.ExitStack() as stack:
        if mesh is not None:
            stack.enter_context(jax.set_mesh(mesh))
        check_mesh_divides(config)
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(
            workdir, config.checkpoint, {"config": dataclasses.asdict(config), "model": about})))
        bar = stack.enter_context(ProgressBar(config))
        state = checkpoints.restore(init_state(params, config, bundle.config), bar.log)
        start = int(state.step)
        bar.advance(start)
        if start:
            bar.log(f"resuming {workdir} after step {start} of {config.train.steps}")
        validate = _validator(config, bundle, validation)
        full_params = functools.partial(model_params, lora=config.lora, model=bundle.config)
        if start == config.train.steps:
            bar.log(f"{workdir} is finished at step {start}; set a larger train.steps to continue")
            return Outcome(start, None, validate(full_params(state)), clock.elapsed())
        log = stack.enter_context(contextlib.closing(RunLog(workdir, start, config) if is_primary() else NoLog()))
        recorder = Recorder(config, log, bar, clock, throughput(config, bundle.config, training.length))
        next_batch: Callable[[TrainState], Batch]
        if config.reinforce.reward:
            assert isinstance(training, Dataset) and tokenizer is not None
            next_batch = Rollouts(config, bundle, training, tokenizer, full_params, clock)
        else:
            batches = stack.enter_context(contextlib.closing(device_batches(config, training, start, clock)))
            next_batch = functools.partial(_next_of, batches)
        profile = Profile(workdir / "profile", profile_steps)
        stack.callback(profile.close)
        step_at = _compiled_steps(config, bundle, state, training)
        stop = stack.enter_context(stop_request())
        alive = stack.enter_context(watchdog(config.log.stall))
        evaluate = _evaluator(validate, full_params, sample_texts, recorder, clock)
        before = None if start else evaluate(0, state)
        saver = Saver(config, checkpoints, workdir, clock)
        run = Run(config, next_batch, step_at, recorder, evaluate, saver, stop, alive, profile, clock)
        after = train_loop(run, state)
    return Outcome(config.train.steps, before, after, clock.elapsed(), clock.goodput(), recorder.skipped)


def _next_of(batches: Iterator[Batch], _: TrainState) -> Batch:
    """The next batch, which does not depend on the state."""
    return next(batches)


def _compiled_steps(config: Config, bundle: Bundle, state: TrainState,
                    training: Dataset | Mixture) -> Callable[[int], jax.stages.Compiled]:
    """A function from the number of steps done to the compiled step that comes next.

    A step is compiled once for each block size of the recipe; the first one now, before the training's clock starts.
    """
    batch = (example_rollouts if config.reinforce.reward else example_batch)(config, training)
    names = training.names if len(training.names) > 1 else ()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)

    @functools.cache
    def compiled(recipe: Recipe) -> jax.stages.Compiled:
        step = make_step(dataclasses.replace(config, recipe=recipe), bundle.config, bundle.spec.mask_token_id, names)
        return step.lower(abstract, *batch).compile()

    compiled(recipe_at(config.recipe, int(state.step), training.length))
    return lambda done: compiled(recipe_at(config.recipe, done, training.length))


def _validator(config: Config, bundle: Bundle, dataset: Dataset) -> Callable[[Params], float]:
    """A function from parameters to nats per token on the validation records, always under the same noise."""
    tokens, segments = dataset.rows(slice(0, config.data.validation_records or None))
    rows = list(zip(np.asarray(tokens), np.asarray(segments)))
    exact = not config.recipe.masks
    recipe = AR if exact else denoising_recipe(bundle.spec)
    samples = 1 if exact else config.evaluate.mc_samples

    def validate(params: Params) -> float:
        return float(likelihood(params, bundle.config, recipe, bundle.spec.mask_token_id, rows, samples))

    return validate


def _evaluator(validate: Callable[[Params], float], full_params: Callable[[TrainState], Params],
               sample_texts: SampleTexts | None, recorder: Recorder,
               clock: GoodputClock) -> Callable[[int, TrainState], float]:
    """A function that validates the state after a step, records the NELBO and sample texts, and returns the NELBO."""

    def evaluate(step: int, state: TrainState) -> float:
        params = full_params(state)
        nelbo = validate(params)
        recorder.validation(step, nelbo)
        if sample_texts is not None:
            recorder.samples(step, sample_texts(params))
        clock.spend("validation")
        return nelbo

    return evaluate


def _check_length(dataset: Dataset | Mixture, bundle: Bundle) -> None:
    if dataset.length > bundle.config.max_length:
        raise UserError(f"{dataset.directory} has records of {dataset.length} tokens and the model reads at most "
                        f"{bundle.config.max_length}; prepare the text with a smaller length")
