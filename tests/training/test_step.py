"""The training step and its optimizer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.attention.visibility import training_rule
from dlm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelSource,
    OptimizerConfig,
    TrainConfig,
)
from dlm_jax.diffusion.noise import add_noise
from dlm_jax.diffusion.recipes import RECIPES, recipe
from dlm_jax.models.weights import flatten, weight_table
from dlm_jax.objective.loss import LossSums, loss_sums
from dlm_jax.training.optimizer import learning_rate, make_optimizer
from dlm_jax.training.step import extra_losses, init_state, make_step

MASK = 30
compiled = functools.cache(make_step)
STEPS = 150
SEED = 3
PEAK = 0.02


def make_config(name: str = "mdlm", accumulate: int = 1, **model) -> Config:
    """A config of a recipe, with blocks of 4 and a short annealing."""
    chosen = recipe(name)
    chosen = dataclasses.replace(chosen, block_size=min(chosen.block_size, 4), anneal_steps=min(chosen.anneal_steps, 9))
    optimizer, run = OptimizerConfig(PEAK, "constant", warmup_steps=5), TrainConfig(STEPS, 8, accumulate, SEED)
    return Config(chosen, ModelSource("nowhere", **model), DataConfig("none", "none", 8), optimizer, run,
                  CheckpointConfig(1), LogConfig(1), EvaluateConfig(1))


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray]:
    """Eight records of eight tokens, packed and padded unevenly, and few enough to be memorized."""
    tokens = np.random.default_rng(0).integers(0, MASK, (8, 8))
    segments = np.ones((8, 8), int)
    segments[2:4, 5:] = 2
    segments[4:6, 6:] = 0
    return tokens, segments


def train(config: Config, model, text, steps: int):
    """The state after `steps` steps, and the metrics of each of them."""
    architecture, params = model
    params = jax.tree.map(lambda w: 0.2 * w, params)
    step, state, metrics = compiled(config, architecture, MASK), init_state(params, config, architecture), []
    for _ in range(steps):
        state, found = step(state, *text)
        metrics.append(jax.device_get(found))
    return state, metrics


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_overfits_a_few_records(random_model, text, name):
    _, metrics = train(make_config(name), random_model(), text, STEPS)
    assert_learned(metrics)


def test_training_in_bf16_with_remat_learns_and_keeps_fp32_master_weights(random_model, text):
    state, metrics = train(make_config("ar", dtype="bfloat16", remat="save_projections"), random_model(), text, STEPS)
    assert_learned(metrics)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}


def assert_learned(metrics: list[dict]) -> None:
    losses = [m["masked_loss"] for m in metrics]
    assert np.isfinite([list(m.values()) for m in metrics]).all()
    assert np.mean(losses[-20:]) < 0.7 * np.mean(losses[:5])


@pytest.fixture(scope="module")
def three_steps(random_model, text):
    return train(make_config("bd3lm"), random_model(), text, 3)


def test_the_same_seed_gives_the_same_bits(random_model, text, three_steps):
    jax.tree.map(np.testing.assert_array_equal, train(make_config("bd3lm"), random_model(), text, 3), three_steps)


@pytest.mark.parametrize("accumulate", [2, 4])
def test_gradient_accumulation_changes_neither_metrics_nor_parameters(random_model, text, three_steps, accumulate):
    state, metrics = train(make_config("bd3lm", accumulate), random_model(), text, 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), metrics, three_steps[1])
    # Adam's first updates have the size of the rate whatever the gradient: where that is rounding, they may differ.
    differences = jax.tree.map(lambda a, b: np.abs(a - b).ravel(), state.params, three_steps[0].params)
    assert np.quantile(np.concatenate(jax.tree.leaves(differences)), 0.99) < 1e-4 * PEAK * 3


def test_metrics_are_those_of_the_loss_at_the_parameters_before_the_step(random_model, text, three_steps):
    config, (architecture, params) = make_config("bd3lm"), random_model()
    params = jax.tree.map(lambda w: jnp.asarray(0.2 * w), params)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def mean_loss(params):
        batch = add_noise(jax.random.fold_in(jax.random.key(SEED), 0), *map(jnp.asarray, text), config.recipe)
        rule = training_rule(config.recipe, 8, jnp.int32(0), SEED)
        sums = loss_sums(params, batch, rule, MASK, config.recipe, architecture)
        return sums.loss / sums.target_count, sums

    (loss, sums), gradients = mean_loss(params)
    metrics = three_steps[1][0]
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(gradients)))
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["masked_loss"], sums.masked_loss / sums.masked, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-4)
    np.testing.assert_allclose([m["learning_rate"] for m in three_steps[1]], PEAK * np.arange(1, 4) / 6, rtol=1e-5)
    assert int(three_steps[0].step) == 3


def test_the_means_of_a_batch_with_one_target_are_its_sums():
    config = make_config()
    config = dataclasses.replace(config, recipe=dataclasses.replace(recipe("nemotron"), kl_weight=0.5))
    sums = LossSums(*map(jnp.asarray, (5.0, 1, 5.0, 1, 2.0, 3.0, np.zeros((0, 2)))))
    assert extra_losses(sums, config, []) == {"ar_loss": 2, "kl": 3}


def test_a_source_without_a_masked_token_has_a_loss_of_zero():
    sums = LossSums(*map(jnp.asarray, (5.0, 9, 5.0, 2, 0.0, 0.0, [[5.0, 2], [0.0, 0]])))
    assert extra_losses(sums, make_config(), ["code", "prose"]) == {"masked_loss/code": 2.5, "masked_loss/prose": 0}


def test_a_step_with_a_finite_loss_and_a_gradient_that_overflows_is_skipped(random_model, text):
    """Logits of zero make the loss ln v, whatever the hidden states are; the head's gradient is as large as they."""
    architecture, params = random_model("llama")
    params = params | {"head": jax.tree.map(jnp.zeros_like, params["head"]),
                       "final_norm": jax.tree.map(lambda scale: scale * 1e25, params["final_norm"])}
    config = make_config("mdlm")
    state = init_state(params, config, architecture)
    before = jax.device_get(state)
    state, metrics = compiled(config, architecture, MASK)(state, *text)
    assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    assert (int(metrics["skipped_in_a_row"]), int(metrics["skipped"])) == (1, 1)
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, name), getattr(before, name))


def test_a_step_with_a_non_finite_loss_is_skipped_and_counted(random_model, text):
    architecture, params = random_model()
    config = make_config("bd3lm")
    step, state = compiled(config, architecture, MASK), init_state(params, config, architecture)
    state, _ = step(state, *text)
    broken = jax.tree.map(jnp.array, state)
    broken.params["final_norm"]["scale"] = broken.params["final_norm"]["scale"].at[0].set(jnp.inf)
    before = jax.device_get(broken)
    for count in (1, 2):
        broken, metrics = step(broken, *text)
        assert (int(metrics["skipped_in_a_row"]), int(metrics["skipped"])) == (count, count)
    for name in ("params", "optimizer"):
        jax.tree.map(np.testing.assert_array_equal, getattr(broken, name), getattr(before, name))
    assert int(broken.step) == 3
    good, metrics = step(dataclasses.replace(broken, params=jax.tree.map(jnp.array, before.params | {
        "final_norm": jax.device_get(state.params["final_norm"])})), *text)
    assert (int(metrics["skipped_in_a_row"]), int(metrics["skipped"])) == (0, 2) and np.isfinite(metrics["loss"])


@pytest.mark.parametrize("kind", [np.array, jnp.array])
def test_training_leaves_the_callers_parameters_alone(random_model, text, kind):
    architecture, params = random_model()
    passed = jax.tree.map(kind, params)
    config = make_config("bd3lm")
    compiled(config, architecture, MASK)(init_state(passed, config, architecture), *text)
    jax.tree.map(np.testing.assert_array_equal, passed, params)


# ----------------------------------------------------------------------------------------------------- the optimizer
def rates(steps: int, **fields) -> np.ndarray:
    schedule = learning_rate(OptimizerConfig(1.0, **fields), steps)
    return np.array([schedule(step) for step in range(steps + 3)])


def test_a_constant_rate_warms_up_from_the_first_step_and_stays_there():
    np.testing.assert_allclose(rates(6, schedule="constant", warmup_steps=3), [0.25, 0.5, 0.75] + [1] * 6, rtol=1e-6)
    np.testing.assert_allclose(rates(3, schedule="constant"), 1)


def test_a_cosine_decays_from_the_peak_to_its_final_ratio():
    found = rates(12, schedule="cosine", warmup_steps=2, final_lr_ratio=0.1)
    angle = np.pi * np.arange(11) / 10
    np.testing.assert_allclose(found[:2], [1 / 3, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(found[2:13], 0.1 + 0.9 * (1 + np.cos(angle)) / 2, rtol=1e-5)
    np.testing.assert_allclose(found[12:], 0.1, rtol=1e-6)


def test_wsd_is_stable_and_decays_linearly_over_the_last_steps():
    found = rates(10, schedule="wsd", warmup_steps=1, decay_steps=4, final_lr_ratio=0.2)
    np.testing.assert_allclose(found[:11], [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
    np.testing.assert_allclose(found[10:], 0.2, rtol=1e-6)


def test_wsd_without_decay_steps_stays_constant():
    np.testing.assert_allclose(rates(5, schedule="wsd")[:5], 1)


def test_weight_decay_spares_biases_and_norms(random_model):
    config, params = random_model("gpt2")
    optimizer = make_optimizer(OptimizerConfig(0.5, "constant", weight_decay=0.1), 10, config)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = jax.jit(lambda p: optimizer.update(zeros, optimizer.init(p), p)[0])(params)
    for path, weight in weight_table(config).items():
        expected = -0.5 * 0.1 * flatten(params)[path] if weight.std else 0 * flatten(params)[path]
        np.testing.assert_allclose(flatten(updates)[path], expected, rtol=1e-6, err_msg=path)


def test_a_bfloat16_first_moment_halves_its_memory_and_hardly_changes_the_training(random_model, text):
    config, model = make_config(), random_model()
    half = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, first_moment_dtype="bfloat16"))
    (state, metrics), (other, others) = (train(c, model, text, 40) for c in (config, half))
    moments, halved = (next(x for x in jax.tree.leaves(s.optimizer, is_leaf=lambda x: hasattr(x, "mu"))
                            if hasattr(x, "mu")) for s in (state, other))
    assert {x.dtype.name for x in jax.tree.leaves(halved.mu)} == {"bfloat16"}
    assert jax.tree.map(lambda x: x.dtype, halved.nu) == jax.tree.map(lambda x: x.dtype, moments.nu)
    assert {x.dtype.name for x in jax.tree.leaves(other.params)} == {"float32"}
    assert float(others[-1]["loss"]) == pytest.approx(float(metrics[-1]["loss"]), rel=0.1)


def test_a_gradient_is_clipped_to_the_global_norm(random_model):
    config, params = random_model()
    # With beta1 = 0 and an epsilon that dwarfs the gradient, the update is the clipped gradient over epsilon.
    settings = OptimizerConfig(1.0, "constant", beta1=0, epsilon=1e6, weight_decay=0, grad_clip_norm=0.5)
    optimizer = make_optimizer(settings, 10, config)
    gradients = jax.tree.map(lambda w: 100 * w, params)
    updates = jax.jit(lambda p: optimizer.update(gradients, optimizer.init(p), p)[0])(params)
    norm = np.sqrt(sum(np.sum(np.square(u, dtype=np.float64)) for u in jax.tree.leaves(updates)))
    np.testing.assert_allclose(norm, 0.5e-6, rtol=1e-3)
