"""The training step: one pure function of (state, batch)."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from dlm_jax import struct
from dlm_jax.attention.visibility import training_rule
from dlm_jax.config import Config
from dlm_jax.diffusion.noise import NoisyBatch, add_noise, with_sources
from dlm_jax.diffusion.trajectory import trajectory_batch
from dlm_jax.errors import UserError
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora, merge_trained, split_trained, trained_table
from dlm_jax.models.sharding import param_specs, shard_params
from dlm_jax.models.transformer import ForwardOptions
from dlm_jax.models.weights import Params, weight_table
from dlm_jax.objective.jacobi import iterate_guesses
from dlm_jax.objective.loss import LossSums, loss_sums
from dlm_jax.parallel.compiler_options import compiler_options
from dlm_jax.parallel.context import splits_tokens
from dlm_jax.parallel.mesh import BATCH_AXES, auto_sharded, axis_size, constrain
from dlm_jax.training.optimizer import learning_rate, make_optimizer
from dlm_jax.typing import Array, Bool, Int32, Segments, Shaped, Tokens, shape_checked

Tree = TypeVar("Tree")
Metrics = dict[str, jax.Array]  # fp32 and int32 scalars by name
Step = jax.stages.Wrapped  # a jitted (state, tokens, segments, *source) -> (state, metrics)

ADAPTER_STREAM = 2**31  # folded into the seed for the adapters' initial values: a step number that no run reaches


@struct.dataclass
class TrainState:
    """What a step turns into the next one, and the frozen weights that it only reads."""

    step: Int32[jax.Array, ""]  # steps done
    params: Params  # fp32, the weights that are trained
    optimizer: optax.OptState  # AdamW's moments
    skipped: Int32[jax.Array, "2"]  # skipped steps: in a row up to now, and in total
    # `model`: the weights beside the trained ones; `teacher`: the base that the KL loss compares with.
    frozen: dict[str, Params] = struct.field(default_factory=dict)


def init_state(params: Params, config: Config, model: ModelConfig) -> TrainState:
    """The state before the first step, from all `params` of the model. In a mesh it is sharded as `param_specs` says,
    moments like their weights."""
    table = weight_table(model)
    key = jax.random.fold_in(jax.random.key(config.train.seed), ADAPTER_STREAM)
    trained, rest = split_trained(params, model, config.lora, key)
    frozen = {"model": shard_params(rest, table)} if rest else {}
    if config.recipe.kl_weight:
        frozen["teacher"] = shard_params(params, table)
    trained = shard_params(trained, trained_table(model, config.lora))
    moments = jax.jit(make_optimizer(config.optimizer, config.train.steps, model, config.lora).init)(trained)
    return TrainState(jnp.int32(0), trained, moments, jnp.zeros(2, jnp.int32), frozen)


def model_params(state: TrainState, lora: Lora, model: ModelConfig) -> Params:
    """The parameters of the model, adapters merged."""
    if not lora.rank:
        return state.params

    def merged(trained: Params, frozen: Params) -> Params:
        return merge_trained(trained, frozen, lora)

    return jax.jit(auto_sharded(merged, param_specs(weight_table(model))))(state.params, state.frozen["model"])


def check_mesh_divides(config: Config) -> None:
    """Raises `UserError` if a micro-batch, or a record, cannot be split evenly over the mesh that is set."""
    train, context, length = config.train, axis_size("context"), config.data.seq_length
    devices, rows = axis_size(*BATCH_AXES), train.global_batch_size // train.grad_accum_steps
    if rows % devices:
        raise UserError(f"train.global_batch_size / train.grad_accum_steps = {rows} rows cannot be split evenly over "
                        f"mesh.replica x mesh.fsdp = {devices} devices; choose a multiple of {devices}, or raise "
                        "mesh.tensor")
    if context > 1 and not splits_tokens(length):
        raise UserError(f"data.seq_length {length} cannot be split evenly over mesh.context = {context} devices; "
                        f"choose a multiple of {context}")


def make_step(config: Config, model: ModelConfig, mask_id: int | None, sources: Sequence[str] = ()) -> Step:
    """The jitted step (state, tokens, segments) -> (state, metrics); tokens and segments int [b, n].

    With `reinforce.reward` it takes a batch of `rollouts.Rollouts` instead.

    With the names of a mixture's `sources`, a fourth argument, int [b], is the source of each record. The noise is a
    function of (train.seed, step) and is drawn for the global batch before it is split into micro-batches, so up to
    rounding the result does not depend on `train.grad_accum_steps`. A step with a non-finite loss or gradient changes
    nothing but the counts. The state that goes in is donated.
    """
    optimizer = make_optimizer(config.optimizer, config.train.steps, model, config.lora)
    rate = learning_rate(config.optimizer, config.train.steps)
    gradient_sums = make_gradient(config, model, mask_id, len(sources))

    @functools.partial(jax.jit, donate_argnums=0, compiler_options=compiler_options())
    @shape_checked
    def step(state: TrainState, tokens: Tokens, segments: Segments, *rest: Shaped[Array, "b ..."]
             ) -> tuple[TrainState, Metrics]:
        layout = (param_specs(trained_table(model, config.lora)), PartitionSpec())
        gradients, sums = auto_sharded(gradient_sums, layout)(
            state.params, state.frozen, state.step, tokens, segments, *rest)
        gradients = jax.tree.map(lambda g: g / jnp.maximum(sums.target_count, 1), gradients)
        updates, moments = optimizer.update(gradients, state.optimizer, state.params)
        loss, norm = sums.loss / jnp.maximum(sums.target_count, 1), optax.tree.norm(gradients)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        params, moments = select(finite, (optax.apply_updates(state.params, updates), moments),
                                 (state.params, state.optimizer))
        skipped = jnp.where(finite, state.skipped.at[0].set(0), state.skipped + 1)
        metrics = dict(
            loss=loss,
            masked_loss=sums.masked_loss / jnp.maximum(sums.masked, 1),
            gradient_norm=norm,
            learning_rate=rate(state.step),
            skipped_in_a_row=skipped[0],
            skipped=skipped[1],
            **extra_losses(sums, config, sources),
        )
        if config.reinforce.reward:
            metrics["reward"] = jnp.mean(rest[-1])
        return TrainState(state.step + 1, params, moments, skipped, state.frozen), metrics

    return step


def make_gradient(config: Config, model: ModelConfig, mask_id: int | None,
                  source_count: int) -> Callable[..., tuple[Params, LossSums]]:
    """The function (trained, frozen, step, tokens, segments, *rest) -> (gradients, sums), both summed over the
    global batch and not yet divided by its tokens."""
    recipe = config.recipe

    def corrupt(step: jax.Array, tokens: jax.Array, segments: jax.Array, *rest: jax.Array) -> NoisyBatch:
        key = jax.random.fold_in(jax.random.key(config.train.seed), step)
        if config.reinforce.reward:
            commit_step, advantage, _ = rest
            u = jax.random.uniform(key, (tokens.shape[0], 1))
            return trajectory_batch(u, tokens, segments, commit_step, advantage, recipe.block_size)
        batch = add_noise(key, tokens, segments, recipe, step)
        return with_sources(batch, rest[0], source_count) if rest else batch

    def gradient(trained: Params, frozen: dict[str, Params], step: jax.Array, tokens: jax.Array,
                 segments: jax.Array, *rest: jax.Array) -> tuple[Params, LossSums]:
        batch = jax.tree.map(shard_rows, corrupt(step, tokens, segments, *rest))
        rule = training_rule(recipe, tokens.shape[1], step, config.train.seed)

        def loss(trained: Params, micro_batch: NoisyBatch) -> tuple[jax.Array, LossSums]:
            params = merge_trained(trained, frozen.get("model", {}), config.lora)
            options = ForwardOptions(dtype=jnp.dtype(config.model.dtype), remat=config.model.remat)
            if recipe.corruption == "jacobi":
                micro_batch = iterate_guesses(params, micro_batch, rule, recipe, model, **options)
            sums = loss_sums(params, micro_batch, rule, mask_id, recipe, model, frozen.get("teacher"), **options)
            return sums.loss, sums

        return accumulate(jax.grad(loss, has_aux=True), trained, batch, config.train.grad_accum_steps)

    return gradient


def extra_losses(sums: LossSums, config: Config, sources: Sequence[str]) -> Metrics:
    """The means that only some runs have: the AR loss and the divergence per token, and the loss of each source per
    masked token."""
    metrics = {}
    if config.recipe.ar_weight:
        metrics["ar_loss"] = sums.ar_loss / jnp.maximum(sums.target_count, 1)
    if config.recipe.kl_weight:
        metrics["kl"] = sums.kl / jnp.maximum(sums.target_count, 1)
    for name, (masked_loss, masked) in zip(sources, sums.by_source):
        metrics[f"masked_loss/{name}"] = masked_loss / jnp.maximum(masked, 1)
    return metrics


@shape_checked
def select(condition: Bool[Array, ""], new: Tree, old: Tree) -> Tree:
    """The tree `new` if the condition holds, else `old`."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def shard_rows(x: jax.Array) -> jax.Array:
    """A batch [b, ...] with its rows sharded over the devices."""
    return constrain(x, BATCH_AXES, *[None] * (x.ndim - 1))


def accumulate(gradient: Callable[[Params, NoisyBatch], tuple[Params, LossSums]], params: Params, batch: NoisyBatch,
               parts: int) -> tuple[Params, LossSums]:
    """Sums `gradient(params, micro_batch) -> (gradients, sums)` over `parts` equal micro-batches, one after the other.

    Micro-batch i has the rows i, i + parts, ..., so every device has its shard of each.
    """
    if parts == 1:
        return gradient(params, batch)

    def split(x: jax.Array) -> jax.Array:  # [b, ...] -> [parts, b / parts, ...]
        return constrain(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), None, BATCH_AXES)

    micro_batches = jax.tree.map(split, batch)
    first = jax.tree.map(lambda x: x[0], micro_batches)
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(gradient, params, first))

    def add(total: tuple[Params, LossSums], micro_batch: NoisyBatch) -> tuple[tuple[Params, LossSums], None]:
        return jax.tree.map(jnp.add, total, gradient(params, micro_batch)), None

    total, _ = jax.lax.scan(add, zeros, micro_batches)
    return total
