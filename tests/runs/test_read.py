"""Reading the model of a run: what it returns, what it refuses, and what it does not import."""

import json
import random
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from dlm_jax.adapt import adapt
from dlm_jax.config import load_config
from dlm_jax.errors import UserError
from dlm_jax.language_model import load
from dlm_jax.loading import load_bundle
from dlm_jax.runs import checkpoint_steps, read_work_directory
from dlm_jax.runs.read import read_trained

pytestmark = pytest.mark.usefixtures("compiled_once")
TWO_STEPS = ["train.steps=2", "checkpoint.every=1", "recipe.anneal_steps=0", "optimizer.warmup_steps=0"]


@pytest.fixture(scope="module")
def finished(tiny_config, tiny_run, tmp_path_factory):
    """A run of two steps with a checkpoint after each."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    adapt(load_config(tiny_config, [*tiny_run, *TWO_STEPS]), workdir)
    return workdir


def test_loading_and_sampling_a_run_imports_neither_optax_nor_the_training_step(finished):
    program = ("import sys, dlm_jax.loading, dlm_jax\n"
               "dlm_jax.load(sys.argv[1]).sample('the cat', max_tokens=4)\n"
               "print(sorted({'optax', 'dlm_jax.training', 'dlm_jax.training.step'} & set(sys.modules)))\n")
    done = subprocess.run([sys.executable, "-c", program, str(finished)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_a_run_is_read_without_a_word(finished, caplog):
    load_bundle(finished)
    assert not caplog.records


def test_the_newest_checkpoint_is_read_with_its_tokenizer(finished):
    assert checkpoint_steps(finished) == [1, 2]
    bundle = read_work_directory(finished)
    assert bundle.tokenizer_dir == finished / "tokenizer"
    assert bundle.spec.recipe == json.loads((finished / "model.json").read_text())["recipe"] == "diffullama"


def test_a_run_without_a_checkpoint_or_with_a_damaged_one_is_refused(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    (copy / "checkpoints" / "2" / "params" / "manifest.ocdbt").write_bytes(b"")
    with pytest.raises(UserError, match=r"checkpoints/2 is damaged \(\w+\); remove it to use the previous one"):
        read_work_directory(copy)
    shutil.rmtree(copy / "checkpoints" / "2")
    assert checkpoint_steps(copy) == [1] and read_work_directory(copy).config == read_work_directory(finished).config
    shutil.rmtree(copy / "checkpoints" / "1")
    with pytest.raises(UserError, match="has no checkpoint yet; let the run reach its first one"):
        read_work_directory(copy)


def test_no_flipped_bit_of_a_run_changes_the_model_that_is_read(finished, tmp_path):
    chance, refused, intact = random.Random(0), 0, read_work_directory(finished)
    newest = finished / "checkpoints" / "2"
    files = [finished / "model.json", *sorted(file for file in newest.rglob("*") if file.is_file())]
    for file in files:
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        copy = shutil.copytree(finished, tmp_path / "run") / file.relative_to(finished)
        data = bytearray(copy.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        copy.write_bytes(data)
        try:
            read = read_work_directory(tmp_path / "run")
            assert (read.config, read.spec) == (intact.config, intact.spec), file
            assert jax.tree.all(jax.tree.map(np.array_equal, read.params, intact.params)), file
        except UserError as error:
            assert "checkpoints/2 is damaged" in str(error)
            refused += 1
    assert refused > 3


def test_adapters_are_merged_in_fp32_into_the_base_beside_them(tiny_config, tiny_run, base, tmp_path):
    workdir = tmp_path / "run"
    load(base).export(tmp_path / "half", dtype="bfloat16")
    adapt(load_config(tiny_config, [*tiny_run, *TWO_STEPS, "lora.rank=2", f"model.base={tmp_path / 'half'}"]), workdir)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_bundle(workdir).params)} == {"float32"}
    trained, lora = read_trained(workdir)
    assert lora.rank == 2 and "lora" in trained.params
    assert "lora" not in load_bundle(workdir).params
    with pytest.raises(UserError, match="holds adapters but not the base model they were trained on"):
        read_work_directory(workdir)
