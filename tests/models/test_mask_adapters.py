"""Adapters of masks: what is no mask is read as by the base, bit for bit, and masks as by the adapted model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.attention.rules import Bidirectional, Causal
from dlm_jax.commands.main import main
from dlm_jax.config import load_config
from dlm_jax.errors import UserError
from dlm_jax.language_model import load
from dlm_jax.models.adapters import MaskAdapters
from dlm_jax.models.lora import Lora, merge, split_trained, trained_table, with_mask_adapters
from dlm_jax.models.transformer import empty_cache, forward, forward_cached
from dlm_jax.models.weights import flatten, unflatten, weight_table
from dlm_jax.sampling.settings import Settings

LORA = Lora(rank=3, alpha=6.0, gated=True)
GATED = ["recipe=hybrid_shifted", "recipe.block_size=8", "recipe.ar_weight=0", "lora.rank=4", "lora.gated=true"]


def adapted(random_model, family: str = "llama"):
    """(config, params) of a base, and of the same model with adapters of random values for the token 7."""
    config, params = random_model(family)
    changed = with_mask_adapters(config, LORA, 7)
    trained, frozen = split_trained(params, changed, LORA, jax.random.key(0))
    random = np.random.default_rng(1)
    trained = {path: random.normal(0, 0.1, w.shape).astype(np.float32) for path, w in flatten(trained).items()}
    return config, params, changed, unflatten(trained | flatten(frozen))


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_a_text_without_masks_is_read_as_by_the_base_bit_for_bit(random_model, family):
    config, params, changed, all_params = adapted(random_model, family)
    tokens = jnp.asarray([[1, 2, 3, 4, 5, 6, 8, 9]])
    expected = forward(params, tokens, config=config, rule=Causal())
    assert jnp.array_equal(forward(all_params, tokens, config=changed, rule=Causal()), expected)
    cached, _ = forward_cached(all_params, tokens, empty_cache(changed, 1, 8), 0, config=changed, rule=Causal())
    of_base, _ = forward_cached(params, tokens, empty_cache(config, 1, 8), 0, config=config, rule=Causal())
    assert jnp.array_equal(cached, of_base)
    masked = forward(all_params, tokens.at[0, 4].set(7), config=changed, rule=Causal())
    assert jnp.array_equal(masked[:, :4], expected[:, :4])  # what is before the mask does not see it


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_masks_are_read_as_by_the_model_with_its_adapters_merged(random_model, family):
    config, params, changed, all_params = adapted(random_model, family)
    leaves = flatten(all_params)
    adapters = {f"lora.{path}": w for path, w in leaves.items() if path.endswith((".a", ".b"))}
    base = {path: w for path, w in leaves.items() if path in weight_table(config)}
    row = base["embed.tokens"][7] + LORA.scale * leaves["embed.mask"]
    base["embed.tokens"] = jnp.asarray(base["embed.tokens"]).at[7].set(row)
    merged = merge(unflatten(base), unflatten(adapters), LORA.scale)
    tokens = jnp.full((1, 8), 7)
    found = forward(all_params, tokens, config=changed, rule=Bidirectional())
    np.testing.assert_allclose(found, forward(merged, tokens, config=config, rule=Bidirectional()), atol=2e-5)
    assert np.abs(found - forward(params, tokens, config=config, rule=Bidirectional())).max() > 0.1


def test_adapters_start_at_the_base_and_are_all_that_is_trained(random_model):
    config, params = random_model("llama")
    changed = with_mask_adapters(config, LORA, 7)
    trained, frozen = split_trained(params, changed, LORA, jax.random.key(0))
    tokens = jnp.asarray([[1, 7, 7, 4]])
    start = unflatten(flatten(trained) | flatten(frozen))
    assert jnp.array_equal(forward(start, tokens, config=changed, rule=Bidirectional()),
                           forward(params, tokens, config=config, rule=Bidirectional()))
    assert flatten(frozen).keys() == weight_table(config).keys()
    attention = dataclasses.replace(LORA, target_modules="attention")
    assert set(trained_table(with_mask_adapters(config, attention, 7), attention)) == {
        "embed.mask", *(f"layers.attention.{name}.{part}" for name in "qkvo" for part in "ab")}


@pytest.mark.slow
def test_a_run_leaves_the_base_alone_writes_its_text_and_survives_being_stopped(tiny_config, tiny_run, base, tmp_path,
                                                                                capsys):
    run = [*tiny_run, *GATED, "train.steps=6", "checkpoint.every=3", "optimizer.learning_rate=0.02"]
    adapt(load_config(tiny_config, [*run, "train.steps=3"]), tmp_path / "run")
    adapt(load_config(tiny_config, run), tmp_path / "run")
    adapt(load_config(tiny_config, run), tmp_path / "unbroken")
    lm, before = load(tmp_path / "run"), load(base)
    found, unbroken, old = (flatten(each.params) for each in (lm, load(tmp_path / "unbroken"), before))
    for path in found:
        np.testing.assert_array_equal(found[path], unbroken[path])
        if path in old:
            kept = tuple(map(slice, old[path].shape))  # all but the rows of the mask token
            np.testing.assert_array_equal(np.asarray(found[path])[kept], old[path])
    assert all(np.abs(found[path]).max() > 0 for path in found if path.endswith((".a", ".b")))

    prompts = ["def f(", "import "]
    of_base = before.fill([before.continuation(prompt, 24) for prompt in prompts], Settings())
    for way in ("speculate", "speculate:3"):
        ours = lm.fill([lm.continuation(prompt, 24) for prompt in prompts], Settings(unmasking=way))
        assert [list(sample.tokens) for sample in ours] == [list(sample.tokens) for sample in of_base]

    lm.save(tmp_path / "saved")
    assert load(tmp_path / "saved").config == lm.config
    np.testing.assert_array_equal(flatten(load(tmp_path / "saved").params)["embed.mask"], found["embed.mask"])
    for arguments, words in ((["--layout", "dlm"], "adapters that act on mask tokens only; choose ar"),
                             (["--adapter"], "PEFT has no adapters that act on mask tokens only")):
        assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "no"), *arguments]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "no").exists()
    assert main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "ar"), "--layout", "ar"]) == 0
    assert "no layout has the adapters" in capsys.readouterr().out
    exported = flatten(load(tmp_path / "ar").params)
    for path, weight in exported.items():
        np.testing.assert_array_equal(weight, found[path])

    again = [*run, f"model.base={tmp_path / 'saved'}"]
    with pytest.raises(UserError, match="has mask adapters of rank 4 already"):
        adapt(load_config(tiny_config, [*again, "lora.rank=2"]), tmp_path / "other")
    adapt(load_config(tiny_config, [*again, "train.steps=1", "optimizer.warmup_steps=0"]), tmp_path / "again")
    moved = flatten(load(tmp_path / "again").params)
    assert 0 < np.abs(moved["layers.mlp.up.a"] - found["layers.mlp.up.a"]).max() < 0.05


@pytest.mark.parametrize("changes, words", [
    (["lora.rank=0"], "lora.gated is for adapters and lora.rank is 0"),
    (["lora.modules_to_save=norms"], "leave lora.modules_to_save at 'embeddings'"),
    (["recipe=bd3lm"], "needs a recipe with masks and clean_half token_causal"),
    (["recipe=jacobi_forcing"], "needs a recipe with masks and clean_half token_causal"),
    (["recipe.ar_weight=1"], "set recipe.ar_weight and recipe.kl_weight to 0"),
    (["recipe.kl_weight=1"], "set recipe.ar_weight and recipe.kl_weight to 0")])
def test_what_gated_adapters_cannot_do_is_refused(tiny_config, tiny_run, changes, words):
    with pytest.raises(UserError, match=words):
        load_config(tiny_config, [*tiny_run, *GATED, *changes])


@pytest.mark.parametrize("fields, words", [
    ({"rank": 0}, "rank must lie between 1"), ({"scale": -1.0}, "scale must be positive"),
    ({"target_modules": "head"}, "'head' is not one of"), ({"mask_token_id": 99}, "not in the vocabulary of")])
def test_a_description_that_makes_no_sense_is_refused(random_model, fields, words):
    config, _ = random_model("llama", vocab_size=40)
    described = {"mask_token_id": 7, "rank": 2, "scale": 1.0} | fields
    with pytest.raises(UserError, match=words):
        dataclasses.replace(config, mask_adapters=MaskAdapters(**described))
