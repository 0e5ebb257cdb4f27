"""Recipes: what they set, and the contradictions they refuse."""

import dataclasses

import pytest

from dlm_jax.diffusion.recipes import RECIPES, Recipe, recipe, recipe_at
from dlm_jax.errors import UserError

ONE = {"name": "mine", "streams": 1, "alignment": "shifted"}
TWO = {"name": "mine", "streams": 2, "alignment": "same_position", "block_size": 4}
PLAIN = ONE | {"corruption": "none"}


@pytest.mark.parametrize("fields, words", [
    (ONE | {"streams": 3}, "streams must be 1 or 2"),
    (ONE | {"alignment": "sideways"}, "alignment must be"),
    (ONE | {"corruption": "gaussian"}, "corruption must be"),
    (TWO | {"block_size": 0}, "block_size must be at least 1 with two streams, not 0"),
    (TWO | {"block_size": -4}, "block_size must lie between 0 and 1048576, not -4"),
    (ONE | {"block_size": -4}, "block_size must lie between 0 and 1048576, not -4"),
    (ONE | {"block_size": 4, "anneal_steps": 3}, "anneal_steps opens the causal mask of one stream"),
    (TWO | {"anneal_steps": 10}, "anneal_steps opens the causal mask of one stream"),
    (ONE | {"anneal_steps": -1}, "anneal_steps must not be negative"),
    (ONE | {"anneal_steps": 3_000_000_000}, "anneal_steps must not be negative, nor above 2147483647"),
    (TWO | {"half_life": 0.1}, "half_life goes with position_dependent"),
    (TWO | {"corruption": "position_dependent"}, "half_life goes with position_dependent"),
    (TWO | {"corruption": "position_dependent", "half_life": -0.1}, "half_life must not be negative"),
    (ONE | {"corruption": "position_dependent", "half_life": 0.1}, "half_life goes with position_dependent"),
    (PLAIN | {"alignment": "same_position"}, "without corruption"),
    (PLAIN | {"anneal_steps": 5}, "without corruption"),
    (TWO | {"corruption": "none"}, "without corruption"),
    (ONE | {"t_min": 0.0}, "t_min must lie"),
    (ONE | {"t_min": 0.3, "t_max": 0.2}, "t_max must lie"),
    (ONE | {"loss_weight": "heavy"}, "loss_weight must be 'inverse_level' or"),
    (ONE | {"level_per": "sequence"}, "level_per 'sequence' needs two streams"),
    (ONE | {"clean_half": "token_causal"}, "token_causal clean half needs two streams"),
    (TWO | {"ar_weight": 0.5}, "ar_weight and kl_weight need a token_causal clean half"),
    (TWO | {"corruption": "jacobi"}, "jacobi corruption trains an autoregressive model"),
    (TWO | {"corruption": "jacobi", "alignment": "shifted", "clean_half": "token_causal", "min_one_mask": True},
     "jacobi corruption takes the ends of blocks"),
    (TWO | {"kl_weight": 0.5}, "ar_weight and kl_weight need a token_causal clean half"),
    (TWO | {"ar_weight": -0.5, "clean_half": "token_causal"}, "ar_weight must not be negative"),
    (TWO | {"loss_weight": "cart"}, "'cart' looks at the neighbors in one stream"),
    (TWO | {"complementary": True}, "1/t needs a t_max of at most"),
    (TWO | {"complementary": True, "loss_weight": "none", "min_one_mask": True}, "choose one of them"),
    (ONE | {"block_schedule": "1x5"}, "block_schedule needs two streams"),
    (TWO | {"half_life_steps": 5}, "half_life_steps goes with position_dependent"),
    (ONE | {"level_warmup": -1}, "level_warmup must not be negative"),
    (PLAIN | {"complementary": True}, "without corruption"),
    (PLAIN | {"loss_weight": "none"}, "without corruption"),
    (ONE | {"t_min": 1.0}, "t_min must lie"),
])
def test_contradictory_settings_are_refused_with_the_recipe_and_the_reason(fields, words):
    with pytest.raises(UserError, match=f"recipe 'mine': .*{words}"):
        Recipe(**fields)


def test_an_unknown_recipe_is_refused_with_the_list_of_names():
    with pytest.raises(UserError, match=f"'alchemy'.*{', '.join(RECIPES)}"):
        recipe("alchemy")


@pytest.mark.parametrize("name, rule", [("ar", "causal"), ("diffullama", "bidirectional"), ("mdlm", "bidirectional"),
                                        ("efficient_dlm", "block_causal"), ("bd3lm", "block_causal"),
                                        ("nemotron", "block_causal"), ("set_block_decoding", "block_causal"),
                                        ("hybrid_shifted", "block_causal"), ("jacobi_forcing", "causal")])
def test_a_recipe_names_the_rule_under_which_its_model_denoises(name, rule):
    assert recipe(name).name == name
    assert recipe(name).rule == rule


def test_recipes_have_the_settings_of_their_papers():
    efficient = recipe("efficient_dlm")
    assert (efficient.block_size, efficient.half_life, efficient.alignment) == (16, 0.1, "same_position")
    assert (recipe("diffullama").anneal_steps, recipe("diffullama").alignment) == (10_000, "shifted")
    assert {r.t_min for r in RECIPES.values()} == {1e-3, 0.49}
    assert (recipe("dparallel").certainty_weight, recipe("dparallel").complementary) == (2.0, True)
    assert (recipe("nemotron").clean_half, recipe("nemotron").level_per) == ("token_causal", "sequence")
    sbd = recipe("set_block_decoding")
    assert (sbd.clean_half, sbd.level_per, sbd.loss_weight, sbd.ar_weight) == ("token_causal", "sequence", "none", 1.0)
    jacobi = recipe("jacobi_forcing")
    assert (jacobi.alignment, jacobi.clean_half, jacobi.masks) == ("shifted", "token_causal", False)
    assert (recipe("dream").loss_weight, recipe("dream").alignment) == ("cart", "shifted")
    assert (recipe("fast_dllm_v2").complementary, recipe("fast_dllm_v2").alignment) == (True, "shifted")


def test_blocks_grow_and_shrink_with_the_step_and_a_block_of_the_whole_record_is_one_stream():
    wsd = dataclasses.replace(recipe("llada2_wsd"), block_schedule="1x2,4x3,128x2,64x1")
    stages = [recipe_at(wsd, step, length=100) for step in range(10)]
    assert [stage.block_size for stage in stages] == [1, 1, 4, 4, 4, 0, 0, 64, 32, 32]
    assert [stage.streams for stage in stages] == [2] * 5 + [1, 1] + [2] * 3
    assert len(set(stages)) == 5  # the number of compilations
    held = dataclasses.replace(wsd, clean_half="token_causal", ar_weight=1.0)
    assert recipe_at(held, 5, length=100).block_size == 128  # its clean half is read
    assert recipe_at(recipe("mdlm"), 5, length=100) == recipe("mdlm")


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("mdlm").t_min = 0.5
