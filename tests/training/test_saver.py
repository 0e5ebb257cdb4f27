"""A checkpoint is written only if it can be trained on."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.config import load_config
from dlm_jax.errors import UserError
from dlm_jax.training.goodput import GoodputClock
from dlm_jax.training.saver import Saver
from dlm_jax.training.step import TrainState


class Memory:
    """Checkpoints that are only remembered."""

    directory = Path("nowhere")

    def __init__(self) -> None:
        self.steps: list[int] = []

    def save(self, step: int, state: TrainState) -> None:
        self.steps.append(step)


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def saver(tiny_config, memory, tmp_path) -> Saver:
    return Saver(load_config(tiny_config, ["train.steps=30"]), memory, tmp_path, GoodputClock())


def state(skipped_in_a_row: int = 0, value: float = 1.0) -> TrainState:
    params = {"a": np.ones((2, 3), np.float32), "b": {"c": np.full(3, value, np.float32)}}
    return TrainState(jnp.int32(7), params, (), jnp.array([skipped_in_a_row, 9], jnp.int32))


def test_nothing_is_saved_while_steps_are_skipped_until_the_last(saver, memory):
    done = [saver.save(step, state(skipped)) for step, skipped in ((5, 0), (10, 1), (15, 6), (20, 0), (30, 1))]
    assert done == [True, False, False, True, True] and memory.steps == [5, 20, 30]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_parameters_that_are_not_finite_are_never_saved(saver, memory, value):
    for step in (5, 30):
        with pytest.raises(UserError, match=f"after step {step} parameters are NaN or infinite"):
            saver.save(step, state(value=value))
    assert memory.steps == []
    assert saver.save(5, state(value=np.finfo(np.float32).max))
