"""Recipes: what they fix, and the contradictions that they refuse."""

import dataclasses

import pytest

from dlm_jax.diffusion.recipes import RECIPES, Recipe, recipe
from dlm_jax.errors import UserError

ONE = {"name": "mine", "streams": 1, "alignment": "shifted"}
TWO = {"name": "mine", "streams": 2, "alignment": "same_position", "block_size": 4}
PLAIN = ONE | {"corruption": "none"}


@pytest.mark.parametrize("fields, words", [
    (ONE | {"streams": 3}, "streams must be 1 or 2"),
    (ONE | {"alignment": "sideways"}, "alignment must be"),
    (ONE | {"corruption": "gaussian"}, "corruption must be"),
    (TWO | {"block_size": 0}, "two streams need a block_size"),
    (TWO | {"block_size": -4}, "two streams need a block_size"),
    (ONE | {"block_size": 4}, "block_size 4 needs two streams"),
    (TWO | {"anneal_steps": 10}, "anneal_steps opens the causal mask of one stream"),
    (ONE | {"anneal_steps": -1}, "anneal_steps must not be negative"),
    (TWO | {"half_life": 0.1}, "half_life goes with position_dependent"),
    (TWO | {"corruption": "position_dependent"}, "half_life goes with position_dependent"),
    (TWO | {"corruption": "position_dependent", "half_life": -0.1}, "half_life goes with position_dependent"),
    (ONE | {"corruption": "position_dependent", "half_life": 0.1}, "half_life goes with position_dependent"),
    (PLAIN | {"alignment": "same_position"}, "without corruption"),
    (PLAIN | {"anneal_steps": 5}, "without corruption"),
    (TWO | {"corruption": "none"}, "without corruption"),
    (ONE | {"t_min": 0.0}, "t_min must lie"),
    (ONE | {"t_min": 1.0}, "t_min must lie"),
])
def test_contradictions_are_refused_with_the_recipe_and_the_reason(fields, words):
    with pytest.raises(UserError, match=f"recipe 'mine': .*{words}"):
        Recipe(**fields)


def test_an_unknown_recipe_is_refused_with_the_names_there_are():
    with pytest.raises(UserError, match=f"'alchemy'.*{', '.join(RECIPES)}"):
        recipe("alchemy")


@pytest.mark.parametrize("name, rule", [("ar", "causal"), ("diffullama", "bidirectional"), ("mdlm", "bidirectional"),
                                        ("efficient_dlm", "block_causal"), ("bd3lm", "block_causal")])
def test_a_recipe_names_the_rule_its_model_denoises_under(name, rule):
    assert recipe(name).name == name
    assert recipe(name).rule == rule


def test_the_papers_settings():
    efficient = recipe("efficient_dlm")
    assert (efficient.block_size, efficient.half_life, efficient.alignment) == (16, 0.1, "same_position")
    assert (recipe("diffullama").anneal_steps, recipe("diffullama").alignment) == (10_000, "shifted")
    assert {r.t_min for r in RECIPES.values()} == {1e-3}


def test_a_recipe_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe("mdlm").t_min = 0.5
