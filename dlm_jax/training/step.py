"""The training step: one pure function of (state, batch)."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import PartitionSpec

from dlm_jax.config import Config, Train
from dlm_jax.errors import UserError
from dlm_jax.losses import Sums, annealed_rule, loss_sums
from dlm_jax.mesh import BATCH, pin, shares, spread
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora, join, split, trained_table
from dlm_jax.models.sharding import param_specs, place
from dlm_jax.models.weights import Params, weight_table
from dlm_jax.noise import Noised, add_noise, with_sources
from dlm_jax.training.optimizer import learning_rate, make_optimizer


@struct.dataclass
class State:
    """What a step turns into the next: step (int32), params (fp32, those that are trained), the optimizer's moments,
    and how many steps were skipped, in a row until now and in all (int32 [2]). Beside them what stays: `frozen`, the
    rest of the `model` and the `teacher` that a divergence is from."""

    step: jax.Array
    params: Params
    optimizer: optax.OptState
    skipped: jax.Array
    frozen: dict[str, Params] = struct.field(default_factory=dict)


ADAPTERS = 2**31  # folded into the seed: a step number that no run reaches
Metrics = dict[str, jax.Array]
Step = Callable[..., tuple[State, Metrics]]


def init_state(params: Params, config: Config, model: ModelConfig) -> State:
    """The state before the first step; in a mesh it lies as `param_specs` says, the moments like their weights."""
    whole = weight_table(model)
    key = jax.random.fold_in(jax.random.key(config.train.seed), ADAPTERS)
    trained, rest = split(params, model, config.lora, key)
    frozen = {"model": place(rest, whole)} if rest else {}
    if config.recipe.kl_weight:
        frozen["teacher"] = place(params, whole)
    trained = place(trained, trained_table(model, config.lora))
    moments = jax.jit(make_optimizer(config.optimizer, config.train.steps, model, config.lora).init)(trained)
    return State(jnp.int32(0), trained, moments, jnp.zeros(2, jnp.int32), frozen)


def model_params(state: State, lora: Lora, model: ModelConfig) -> Params:
    """The parameters of the model, adapters merged."""
    if not lora.rank:
        return state.params

    def merged(trained: Params, frozen: Params) -> Params:
        return join(trained, frozen, lora)

    return jax.jit(spread(merged, param_specs(weight_table(model))))(state.params, state.frozen["model"])


def check_shares(train: Train) -> None:
    """Raises `UserError` where a part of a batch cannot be shared out over the mesh that is set."""
    devices, part = shares(*BATCH), train.batch // train.accumulate
    if part % devices:
        raise UserError(f"train.batch / train.accumulate = {part} rows cannot be shared out over mesh.replica x "
                        f"mesh.fsdp = {devices} devices; choose a multiple of {devices}, or give mesh.tensor more")


def make_step(config: Config, model: ModelConfig, mask_id: int | None, sources: Sequence[str] = ()) -> Step:
    """The compiled step (state, tokens, segments) -> (state, metrics); tokens and segments int [batch, length]. Where
    `sources` names those of a mixture, a fourth argument, int [batch], says which each record is from.

    The noise is a function of (train.seed, step) and drawn for the whole batch before it is cut into parts, so the
    result does not depend on `train.accumulate` but for rounding. The state that goes in is donated. metrics: fp32
    scalars.
    """
    optimizer = make_optimizer(config.optimizer, config.train.steps, model, config.lora)
    rate = learning_rate(config.optimizer, config.train.steps)
    recipe = config.recipe

    def gradient(trained: Params, frozen: dict[str, Params], number: jax.Array, tokens: jax.Array,
                 segments: jax.Array, *source: jax.Array) -> tuple[Params, Sums]:
        """Sums over the whole batch of step `number`."""
        key = jax.random.fold_in(jax.random.key(config.train.seed), number)
        batch = add_noise(key, tokens, segments, recipe, number)
        batch = jax.tree.map(rows_apart, with_sources(batch, source[0], len(sources)) if source else batch)
        rule = annealed_rule(recipe, number, config.train.seed, tokens.shape[1])

        def loss(trained: Params, part: Noised) -> tuple[jax.Array, Sums]:
            params = join(trained, frozen.get("model", {}), config.lora)
            sums = loss_sums(params, part, rule, mask_id, recipe, model, frozen.get("teacher"),
                             dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)
            return sums.loss, sums

        return accumulate(jax.grad(loss, has_aux=True), trained, batch, config.train.accumulate)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, *rows: jax.Array) -> tuple[State, Metrics]:
        layout = (param_specs(trained_table(model, config.lora)), PartitionSpec())
        gradients, sums = spread(gradient, layout)(state.params, state.frozen, state.step, *rows)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.tokens, 1), gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        loss, norm = sums.loss / jnp.maximum(sums.tokens, 1), optax.tree.norm(gradients)
        good = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, moments = keep_if(good, (optax.apply_updates(state.params, updates), moments),
                                  (state.params, state.optimizer))
        skipped = jnp.where(good, state.skipped.at[0].set(0), state.skipped + 1)
        metrics = dict(
            loss=loss,
            masked_loss=sums.masked_loss / jnp.maximum(sums.masked, 1),
            gradient_norm=norm,
            learning_rate=rate(state.step),
            skipped_in_a_row=skipped[0],
            skipped=skipped[1],
        )
        for name, weight in (("ar_loss", recipe.ar_weight), ("kl", recipe.kl_weight)):
            if weight:
                metrics[name] = getattr(sums, name) / jnp.maximum(sums.tokens, 1)
        for name, (loss, count) in zip(sources, sums.by_source):
            metrics[f"masked_loss/{name}"] = loss / jnp.maximum(count, 1)
        return State(state.step + 1, params, moments, skipped, state.frozen), metrics

    return step


def keep_if(good: jax.Array, new: Any, old: Any) -> Any:
    """The tree `new` where `good`, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def rows_apart(x: jax.Array) -> jax.Array:
    """A batch whose rows are shared out over the devices."""
    return pin(x, BATCH, *[None] * (x.ndim - 1))


def accumulate(gradient: Callable, params: Params, batch: Noised, parts: int) -> tuple[Params, Sums]:
    """Adds `gradient(params, part) -> (gradients, sums)` over `parts` equal cuts of the batch, one after the other.

    Cut n has the rows n, n + parts, ...: so each device has its share of every cut.
    """
    if parts == 1:
        return gradient(params, batch)
    def cut(x: jax.Array) -> jax.Array:
        return pin(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), None, BATCH)

    cuts = jax.tree.map(cut, batch)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], cuts)))

    def add(total: tuple[Params, Sums], part: Noised) -> tuple[tuple[Params, Sums], None]:
        return jax.tree.map(jnp.add, total, gradient(params, part)), None

    total, _ = jax.lax.scan(add, zeros, cuts)
    return total
