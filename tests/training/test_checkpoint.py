"""What is restored is what was saved, though the buffers were donated to the next step in the meantime."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.config import CheckpointEvery
from dlm_jax.errors import UserError
from dlm_jax.training.checkpoint import Checkpoints
from dlm_jax.training.step import State


def make_state() -> State:
    def leaf(size: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(size).normal(size=size), jnp.float32)

    return State(jnp.int32(0), {"big": leaf(3_000_000), "small": leaf(7)}, {"moment": leaf(2_000_000)})


@jax.jit(donate_argnums=0)
def advance(state: State) -> State:
    return State(state.step + 1, jax.tree.map(lambda x: x * 1.5 + 1, state.params),
                 jax.tree.map(lambda x: x - 3, state.optimizer))


def same(a: State, b: State) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_what_is_restored_is_the_state_of_that_step_though_later_steps_took_its_memory(tmp_path):
    state, kept = make_state(), {}
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1, keep=3))
    for step in range(1, 4):
        state = advance(state)
        kept[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
        checkpoints.save(step, state)
        for _ in range(5):  # while the save is under way
            state = advance(state)
    checkpoints.close()
    for step in (3, 2, 1):
        checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1, keep=3))
        assert same(checkpoints.restore(make_state()), kept[step])
        checkpoints._manager.delete(step)
        checkpoints.close()


def test_without_a_checkpoint_the_fresh_state_is_returned(tmp_path):
    checkpoints, fresh = Checkpoints(tmp_path, CheckpointEvery(every=1)), make_state()
    assert checkpoints.restore(fresh) is fresh
    checkpoints.close()


def test_only_so_many_are_kept_and_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1, keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, make_state())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize("pattern", ["rest/manifest.ocdbt", "params/manifest.ocdbt", "params/_METADATA", "params/d/*"])
def test_a_damaged_checkpoint_is_named(tmp_path, pattern):
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1))
    checkpoints.save(4, make_state())
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "4").glob(pattern):
        file.write_bytes(file.read_bytes()[:3])
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1))
    with pytest.raises(UserError, match=r"checkpoints/4 is damaged \(\w+\); remove it to use the one before it"):
        checkpoints.restore(make_state())
    checkpoints.close()
