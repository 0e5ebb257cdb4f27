"""What is restored is what was saved, though the buffers were donated to the next step in the meantime."""

import json
import re

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

    return State(jnp.int32(0), {"big": leaf(3_000_000), "small": leaf(7)}, {"moment": leaf(2_000_000)},
                 jnp.zeros(2, jnp.int32))


@jax.jit(donate_argnums=0)
def advance(state: State) -> State:
    return State(state.step + 1, jax.tree.map(lambda x: x * 1.5 + 1, state.params),
                 jax.tree.map(lambda x: x - 3, state.optimizer), state.skipped)


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
        assert same(checkpoints.restore(make_state(), print), kept[step])
        checkpoints._manager.delete(step)
        checkpoints.close()


def test_without_a_checkpoint_the_fresh_state_is_returned(tmp_path):
    checkpoints, fresh = Checkpoints(tmp_path, CheckpointEvery(every=1)), make_state()
    assert checkpoints.restore(fresh, print) is fresh
    checkpoints.close()


def test_only_so_many_are_kept_and_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1, keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, make_state())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize("pattern", ["rest/manifest.ocdbt", "params/manifest.ocdbt", "params/_METADATA", "params/d/*"])
def test_a_damaged_checkpoint_is_named_and_set_aside_for_the_one_before_it(tmp_path, pattern):
    checkpoints, state, said = Checkpoints(tmp_path, CheckpointEvery(every=1)), make_state(), []
    checkpoints.save(4, state)
    checkpoints.save(5, make_state())
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "5").glob(pattern):
        file.write_bytes(file.read_bytes()[:3])
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1))
    assert same(checkpoints.restore(make_state(), said.append), state)
    assert re.fullmatch(r".*checkpoints/5 is damaged \(\w+\); going on from the one before it", said[0])
    checkpoints.save(5, state)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    assert (tmp_path / "damaged" / "5").is_dir()


def test_where_all_are_damaged_it_says_so(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1))
    checkpoints.save(4, make_state())
    checkpoints.close()
    (tmp_path / "checkpoints" / "4" / "params" / "manifest.ocdbt").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1))
    with pytest.raises(UserError, match="all checkpoints of .* are damaged; start anew in another directory"):
        checkpoints.restore(make_state(), print)
    checkpoints.close()


def test_those_of_every_so_many_steps_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1, keep=1, keep_every=4))
    for step in range(1, 10):
        checkpoints.save(step, make_state())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8", "9"]


def test_a_checkpoint_says_what_it_is(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointEvery(every=1), {"config": {"train": {"seed": 3}}})
    checkpoints.save(4, make_state())
    checkpoints.close()
    about = json.loads((tmp_path / "checkpoints" / "4" / "about" / "metadata").read_text())
    assert about == {"step": 4, "config": {"train": {"seed": 3}}}
