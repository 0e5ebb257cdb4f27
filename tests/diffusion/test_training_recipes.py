"""Every recipe by name: it trains, resumes where it was killed, samples and exports."""

import json

import numpy as np
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.diffusion.recipes import RECIPES, recipe
from dlm_jax.language_model import load
from dlm_jax.loading import load_bundle
from dlm_jax.models.weights import flatten
from dlm_jax.training.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("compiled_once")


class Killed(BaseException):
    """Ends a run, past every handler of `Exception`."""


def overrides(name: str) -> list[str]:
    """The recipe in miniature: blocks of 4 in records of 16 tokens, schedules of a few steps."""
    chosen = recipe(name)
    small = {"block_size": min(chosen.block_size, 4), "anneal_steps": min(chosen.anneal_steps, 3),
             "block_schedule": "1x2,16x1,4x2" if chosen.block_schedule else ""}
    return [f"recipe={name}", *(f"recipe.{key}={value}" for key, value in small.items()), "train.steps=6",
            "checkpoint.every=3", "evaluate.every=6", "data.validation_records=4"]


def losses(workdir) -> list[dict]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in ("step", "loss", "masked_loss", "gradient_norm")} for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_trains_resumes_and_exports(name, tiny_config, tiny_run, tmp_path, monkeypatch):
    config = load_config(tiny_config, [*[o for o in tiny_run if "anneal" not in o], *overrides(name)])
    adapt(config, tmp_path / "unbroken")

    def save_and_die(self, step, state, original=Checkpoints.save):
        original(self, step, state)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Checkpoints, "save", save_and_die)
        adapt(config, tmp_path / "run")
    adapt(config, tmp_path / "run")
    assert losses(tmp_path / "run") == losses(tmp_path / "unbroken")
    run, unbroken = (flatten(load_bundle(tmp_path / each).params) for each in ("run", "unbroken"))
    assert all(np.array_equal(run[path], unbroken[path]) for path in run)

    lm = load(tmp_path / "run")
    assert (lm.spec.recipe, lm.spec.rule, lm.spec.clean_half) == (
        name, RECIPES[name].rule, RECIPES[name].clean_half if RECIPES[name].masks else "block_causal")
    lm.export(tmp_path / "export")
    again, tokens = load(tmp_path / "export"), np.arange(2, 20)[None]
    np.testing.assert_allclose(again.logits(tokens), lm.logits(tokens), atol=1e-5)
    assert again.sample("the cat", max_tokens=6).tokens == lm.sample("the cat", max_tokens=6).tokens
