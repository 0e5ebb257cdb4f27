"""Training by reward: its batches are a function of seed and step, and better answers become likelier."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.commands.main import main
from dlm_jax.config import load_config
from dlm_jax.data.pairs import prepare_pairs
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.segments import PROMPT_BIT
from dlm_jax.training import rewards
from dlm_jax.training.rollouts import pairs_of

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, base):
    """Records of 32 tokens with short questions and answers."""
    directory = tmp_path_factory.mktemp("pairs") / "records"
    prepare_pairs([(f"the cat {i}", "sat on the mat") for i in range(40)], Tokenizer.load(base), 32, directory, 4)
    return directory


@pytest.fixture(scope="module")
def overrides(base, pairs):
    return [f"model.base={base}", f"data.train={pairs}", f"data.validation={pairs}", "data.validation_records=4",
            "recipe.block_size=4", "train.steps=4", "train.global_batch_size=8", "train.grad_accum_steps=2",
            "optimizer.warmup_steps=0", "log.every=1", "checkpoint.every=2", "evaluate.every=4",
            "evaluate.mc_samples=1", "reinforce.reward=length", "reinforce.group_size=4", "reinforce.max_tokens=8"]


@pytest.fixture(autouse=True)
def length_reward(monkeypatch):
    """Rewards short answers, so that a random model gets different rewards."""
    monkeypatch.setitem(rewards.REWARDS, "length", lambda prompt, answer, reference: -float(len(answer)))


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_that_was_stopped_and_resumed_draws_the_same_answers(overrides, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    adapt(load_config("countdown_grpo", overrides), whole)
    config = load_config("countdown_grpo", overrides)
    adapt(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), parts)
    adapt(config, parts)
    kept = [[(line["step"], line["reward"], line["loss"]) for line in lines(run)] for run in (whole, parts)]
    assert [step for step, _, _ in kept[0]] == [1, 2, 3, 4]
    assert [(step, reward) for step, reward, _ in kept[0]] == [(step, reward) for step, reward, _ in kept[1]]


@pytest.mark.slow
def test_answers_that_are_rewarded_become_likelier(overrides, tmp_path):
    changes = ["train.steps=60", "train.global_batch_size=32", "optimizer.learning_rate=1e-2", "checkpoint.every=60",
               "evaluate.every=60", "reinforce.unmasking=confidence"]
    adapt(load_config("countdown_grpo", overrides + changes), tmp_path / "run")
    rewards = [line["reward"] for line in lines(tmp_path / "run")]
    assert np.mean(rewards[-10:]) > np.mean(rewards[:10]) + 1


def test_the_pairs_of_a_record_are_found_and_plain_text_has_none():
    tokens = np.arange(8)
    segments = np.array([1 + PROMPT_BIT, 1 + PROMPT_BIT, 1, 2 + PROMPT_BIT, 2, 2, 0, 0])
    assert pairs_of(tokens, segments) == [([0, 1], [2]), ([3], [4, 5])]
    with pytest.raises(UserError, match="dlm prepare --pairs"):
        pairs_of(tokens, np.ones(8, int))


@pytest.mark.parametrize("changes,said", (
    (["reinforce.group_size=3"], "no multiple of reinforce.group_size 3"),
    (["recipe.ar_weight=1.0"], "by its reward alone"),
    (["recipe=ar"], "by its reward alone"),
    (["reinforce.reward=beauty"], "there is no reward 'beauty'; choose one of exact"),
    (["reinforce.unmasking=speculate"], "drafts only"),
    (["reinforce.group_size=1"], "group_size"),
    (["reinforce.unmasking=nothing"], "is not an unmasking strategy"),
    (["reinforce.max_tokens=32"], "leaves no room")))
def test_what_a_reward_cannot_train_is_refused_before_the_first_step(overrides, changes, said, tmp_path, capsys):
    flags = [f"--config.{change}" for change in [*overrides, *changes]]
    assert main(["train", "--config", "countdown_grpo", "--workdir", str(tmp_path / "run"), *flags]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_reward_needs_prompts(overrides, prepared, tmp_path):
    with pytest.raises(UserError, match="dlm prepare --pairs"):
        adapt(load_config("countdown_grpo", [*overrides, f"data.train={prepared}"]), tmp_path / "run")


@pytest.mark.slow
def test_several_devices_see_the_same_answers(overrides, tmp_path):
    """A process of its own for each number of devices; the reward is one of ours, since it must be known there."""
    found = []
    for devices in (1, 2):
        run = tmp_path / str(devices)
        flags = [f"--config.{change}" for change in [*overrides, "reinforce.reward=exact", "reinforce.unmasking=random",
                                                     "train.steps=2"]]
        subprocess.run([sys.executable, "-m", "dlm_jax", "train", "--config", "countdown_grpo", "--workdir", str(run),
                        *flags], check=True, capture_output=True,
                       env=os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"})
        found.append([(line["step"], line["reward"], line["masked_loss"]) for line in lines(run)])
    assert [line[0] for line in found[0]] == [1, 2]
    np.testing.assert_allclose(*found, rtol=1e-4)
