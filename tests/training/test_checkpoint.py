"""What is restored is what was saved, although its buffers were donated to the next step in the meantime."""

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlm_jax.config import CheckpointConfig
from dlm_jax.errors import UserError
from dlm_jax.runs.checksum import checksums
from dlm_jax.training.checkpoint import Checkpoints
from dlm_jax.training.step import TrainState


def make_state() -> TrainState:
    def leaf(size: int) -> jax.Array:
        return jnp.asarray(np.random.default_rng(size).normal(size=size), jnp.float32)

    return TrainState(jnp.int32(0), {"big": leaf(3_000_000), "small": leaf(7)}, {"moment": leaf(2_000_000)},
                      jnp.zeros(2, jnp.int32))


@jax.jit(donate_argnums=0)
def advance(state: TrainState) -> TrainState:
    return TrainState(state.step + 1, jax.tree.map(lambda x: x * 1.5 + 1, state.params),
                      jax.tree.map(lambda x: x - 3, state.optimizer), state.skipped)


def same(a: TrainState, b: TrainState) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)))


def test_what_is_restored_is_the_state_of_that_step_although_later_steps_reused_its_memory(tmp_path):
    state, kept = make_state(), {}
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=3))
    for step in range(1, 4):
        state = advance(state)
        kept[step] = jax.tree.map(lambda x: np.array(x, copy=True), state)
        checkpoints.save(step, state)
        for _ in range(5):  # while the save is in progress
            state = advance(state)
    checkpoints.close()
    for step in (3, 2, 1):
        checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=3))
        assert same(checkpoints.restore(make_state(), print), kept[step])
        checkpoints._manager.delete(step)
        checkpoints.close()


def test_without_a_checkpoint_the_fresh_state_is_returned(tmp_path):
    checkpoints, fresh = Checkpoints(tmp_path, CheckpointConfig(every=1)), make_state()
    assert checkpoints.restore(fresh, print) is fresh
    checkpoints.close()


def test_only_the_newest_are_kept_and_what_a_kill_left_is_removed(tmp_path):
    (tmp_path / "checkpoints" / "7.orbax-checkpoint-tmp").mkdir(parents=True)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=2))
    for step in (1, 2, 3):
        checkpoints.save(step, make_state())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["2", "3"]


@pytest.mark.parametrize("pattern", ["rest/manifest.ocdbt", "params/manifest.ocdbt", "params/_METADATA", "params/d/*"])
def test_a_damaged_checkpoint_is_named_and_set_aside_for_the_previous_one(tmp_path, pattern):
    checkpoints, state, said = Checkpoints(tmp_path, CheckpointConfig(every=1)), make_state(), []
    checkpoints.save(4, state)
    checkpoints.save(5, make_state())
    checkpoints.close()
    for file in (tmp_path / "checkpoints" / "5").glob(pattern):
        file.write_bytes(file.read_bytes()[:3])
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    assert same(checkpoints.restore(make_state(), said.append), state)
    assert re.fullmatch(r".*checkpoints/5 is damaged \(\w+\); falling back to the previous one", said[0])
    checkpoints.save(5, state)
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
    assert (tmp_path / "damaged" / "5").is_dir()


def test_if_all_are_damaged_that_is_reported(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    checkpoints.save(4, make_state())
    checkpoints.close()
    (tmp_path / "checkpoints" / "4" / "params" / "manifest.ocdbt").write_bytes(b"")
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    with pytest.raises(UserError, match="all checkpoints of .* are damaged; start over in a new directory"):
        checkpoints.restore(make_state(), print)
    checkpoints.close()


def test_a_checkpoint_of_another_shape_is_called_so_and_stays(tmp_path):
    checkpoints, state = Checkpoints(tmp_path, CheckpointConfig(every=1)), make_state()
    checkpoints.save(4, state)
    checkpoints.close()
    longer = dataclasses.replace(state, params=jax.tree.map(lambda x: np.zeros((x.shape[0] + 1, *x.shape[1:]), x.dtype),
                                                            state.params))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    with pytest.raises(UserError, match=r"checkpoints/4/params has the shape \[.*\] and the model wants \["):
        checkpoints.restore(longer, print)
    assert same(checkpoints.restore(make_state(), print), state)
    checkpoints.close()


def test_checkpoints_at_multiples_of_keep_every_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1, keep=1, keep_every=4))
    for step in range(1, 10):
        checkpoints.save(step, make_state())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "8", "9"]


def test_a_checkpoint_describes_itself(tmp_path):
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1), {"config": {"train": {"seed": 3}}})
    checkpoints.save(4, make_state())
    checkpoints.close()
    about = json.loads((tmp_path / "checkpoints" / "4" / "about" / "metadata").read_text())
    assert (about["step"], about["config"]) == (4, {"train": {"seed": 3}})
    assert about["checksums"]["params"] == checksums(make_state().params)


def flip_one_bit(file: Path, chance: random.Random) -> None:
    data = bytearray(file.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    file.write_bytes(data)


def test_no_flipped_bit_of_a_checkpoint_is_restored(tmp_path):
    def small(value: float) -> TrainState:
        weights = np.random.default_rng(int(value)).normal(size=(40, 30)).astype("float32")
        return TrainState(jnp.int32(value), {"w": jnp.asarray(weights), "half": jnp.asarray(weights, "bfloat16")},
                          {"moment": jnp.asarray(weights ** 2)}, jnp.zeros(2, jnp.int32))

    settings, chance, refused = CheckpointConfig(every=1), random.Random(0), 0
    checkpoints = Checkpoints(tmp_path / "intact", settings, {"model": {"width": 30}})
    checkpoints.save(4, small(4))
    checkpoints.save(5, small(5))
    checkpoints.close()
    files = sorted(f.relative_to(tmp_path / "intact") for f in (tmp_path / "intact/checkpoints/5").rglob("*")
                   if f.is_file())
    for _ in range(2):
        for file in files:
            shutil.rmtree(tmp_path / "flipped", ignore_errors=True)
            shutil.copytree(tmp_path / "intact", tmp_path / "flipped")
            flip_one_bit(tmp_path / "flipped" / file, chance)
            checkpoints, said = Checkpoints(tmp_path / "flipped", settings), []
            restored = checkpoints.restore(small(0), said.append)
            checkpoints.close()
            assert same(restored, small(4 if said else 5)), file
            refused += len(said)
    assert refused > len(files) / 2


def test_values_that_differ_from_their_checksum_are_named_and_not_restored(tmp_path, monkeypatch):
    checkpoints, said = Checkpoints(tmp_path, CheckpointConfig(every=1)), []
    checkpoints.save(4, make_state())
    with monkeypatch.context() as patch:  # as if the files of step 5 held other values than were to be saved
        patch.setattr("dlm_jax.training.checkpoint.checksums", lambda part: checksums(jax.tree.map(jnp.negative, part)))
        checkpoints.save(5, make_state())
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(every=1))
    assert same(checkpoints.restore(make_state(), said.append), make_state())
    checkpoints.close()
    assert said == [f"the checkpoint {tmp_path}/checkpoints/5 is damaged (['big'] differs from its checksum); falling "
                    "back to the previous one"]
