"""From a config to a trained model: where the weights come from, what the run keeps, what the spec states."""

import json
import shutil

import jax
import numpy as np
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.data.dataset import Dataset
from dlm_jax.language_model import load
from dlm_jax.loading import load_bundle, load_tokenizer, with_mask_token
from dlm_jax.models.weights import flatten

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture
def run(tiny_config, tiny_run, tmp_path):
    """Runs two steps with these overrides; returns the outcome and the work directory."""
    def start(*overrides: str):
        short = ["train.steps=2", "recipe.anneal_steps=0", "optimizer.warmup_steps=0"]
        return adapt(load_config(tiny_config, [*tiny_run, *short, *overrides]), tmp_path / "run"), tmp_path / "run"

    return start


def test_a_run_starts_from_the_weights_of_its_base(run, base):
    _, workdir = run("optimizer.learning_rate=1e-12", "optimizer.weight_decay=0")
    model = load_bundle(base)
    expected, _ = with_mask_token(model, load_tokenizer(model), "new")
    found = flatten(load_bundle(workdir).params)
    for path, weight in flatten(expected.params).items():
        np.testing.assert_allclose(found[path], weight, atol=1e-9)


def test_a_run_from_scratch_does_not(run, base):
    _, workdir = run("model.init=scratch", "optimizer.learning_rate=1e-12", "optimizer.weight_decay=0")
    found = load_bundle(workdir).params["embed"]["tokens"]
    assert np.std(found) == pytest.approx(0.02, rel=0.1)  # the base's weights are fifteen times as large


def test_the_log_has_the_loss_of_each_source_of_a_mixture(run, prepared, tmp_path):
    other = shutil.copytree(prepared, tmp_path / "other")
    _, workdir = run(f"data.train={prepared}:0.5,{other}:0.5")
    for line in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines()):
        losses = [line["masked_loss/records"], line["masked_loss/other"]]
        assert min(losses) <= line["masked_loss"] <= max(losses)


def test_text_is_prepared_once_in_the_work_directory_with_the_seq_length_of_the_config(run, texts):
    _, workdir = run(f"data.train={texts}", f"data.validation={texts}", "data.seq_length=12")
    file = workdir / "data" / "train" / "records-00000.array_record"
    before = file.stat().st_mtime_ns
    assert Dataset.open(workdir / "data" / "train").length == 12
    run(f"data.train={texts}", f"data.validation={texts}", "data.seq_length=12")
    assert file.stat().st_mtime_ns == before


def test_autoregressive_training_needs_no_mask_and_leaves_a_causal_model(run, texts):
    outcome, workdir = run("recipe.name=ar", "recipe.corruption=none")
    lm = load(workdir)
    assert (lm.spec.rule, lm.spec.mask_token_id) == ("causal", None)
    assert lm.tokenizer.mask_id is None and outcome.nelbo_before > 0


def test_the_work_directory_is_a_model_with_its_tokenizer(run, base):
    _, workdir = run()
    lm = load(workdir)
    assert lm.spec.base_model == base.name and lm.spec.recipe == "diffullama"
    assert lm.tokenizer.mask_id == lm.spec.mask_token_id == load_bundle(base).config.vocab_size
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(lm.params))
