"""A native directory returns what was written into it, and damage is named."""

import dataclasses
import json
import random
import shutil
import subprocess
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax.convert import native
from dlm_jax.convert.native import read_native, write_native
from dlm_jax.errors import UserError
from dlm_jax.files import SUMS, write_sums
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import flatten, init

ROPE = Rope(500.0, "llama3", 8.0)
CONFIG = ModelConfig("qwen3", 96, 32, 2, 4, 2, 8, 40, 64, ROPE, "rms", 1e-6, "swiglu", qk_norm=True)
SPEC = DiffusionSpec("same_position", "block_causal", 4, 95, 1, 2, "efficient_dlm", "org/base", "abc")
FILE = "params-00001-of-00001.safetensors"


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16])
def bundle(request) -> Bundle:
    return Bundle(CONFIG, init(CONFIG, jax.random.key(0), request.param), SPEC)


@pytest.fixture
def written(bundle: Bundle, tmp_path: Path) -> Path:
    write_native(tmp_path, bundle)
    return tmp_path


def test_writing_then_reading_gives_equal_bits(bundle, written, same):
    back = read_native(written)
    assert (back.config, back.spec, back.tokenizer_dir) == (CONFIG, SPEC, None) and same(back.params, bundle.params)


def test_shards_are_bounded_and_give_equal_bits(bundle, tmp_path, same, monkeypatch):
    monkeypatch.setattr(native, "SHARD_BYTES", 9_000)
    write_native(tmp_path, bundle)
    files = list(tmp_path.glob("*.safetensors"))
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    assert len(files) > 1 and all(sum(a.nbytes for a in load_file(f).values()) <= max(9_000, largest) for f in files)
    assert same(read_native(tmp_path).params, bundle.params)
    files[0].unlink()
    with pytest.raises(UserError, match=files[0].name):
        read_native(tmp_path)


def test_the_safetensors_library_reads_what_we_write(bundle, written):
    tensors, leaves = load_file(written / FILE), flatten(bundle.params)
    assert tensors.keys() == leaves.keys() and all(np.array_equal(tensors[path], leaves[path]) for path in leaves)


def test_the_description_is_the_config_and_the_spec(written):
    fields = json.loads((written / "dlm.json").read_text())
    assert fields == {"format": 1, "model": dataclasses.asdict(CONFIG), **dataclasses.asdict(SPEC)}


@pytest.mark.parametrize(("field", "value", "culprit"), [
    ("format", 2, "not of format 1"), ("model", None, "the model description is None"), ("rule", "all", "rule: 'all'"),
    ("color", 1, "color"), ("mask_token_id", 96, "mask_token_id 96"), ("bos_token_id", 96, "bos_token_id 96"),
    ("eos_token_id", -1, "eos_token_id -1"), ("block_size", "4", "block_size: '4'"), ("recipe", 3, "recipe: 3")])
def test_a_wrong_description_is_named(field, value, culprit, written):
    path = written / "dlm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    write_sums(written)
    with pytest.raises(UserError, match=culprit):
        read_native(written)


@pytest.mark.parametrize(("change", "culprit"), [
    ({"embed.tokens": None}, r"lacks the tensors embed\.tokens"),
    ({"extra": np.zeros(1)}, "unexpected tensors extra"),
    ({"final_norm.scale": np.zeros(31)}, r"final_norm\.scale .* \[31\]"),
    ({"final_norm.scale": np.full(32, np.nan)}, r"final_norm\.scale .* NaN")])
def test_a_wrong_tensor_is_named(change, culprit, written):
    tensors = load_file(written / FILE)
    tensors |= {path: array.astype(np.float32) for path, array in change.items() if array is not None}
    save_file({p: a for p, a in tensors.items() if change.get(p, a) is not None}, written / FILE)
    write_sums(written)
    with pytest.raises(UserError, match=culprit):
        read_native(written)


def test_a_directory_without_weights_is_named(written):
    (written / FILE).unlink()
    with pytest.raises(UserError, match="has no params"):
        read_native(written)


def test_no_flipped_bit_of_a_directory_is_read(bundle, tmp_path, same):
    (tmp_path / "intact").mkdir()
    write_native(tmp_path / "intact", bundle)
    chance, files, refused = random.Random(0), ["dlm.json", FILE, SUMS], []
    for name in 30 * files:
        shutil.rmtree(tmp_path / "flipped", ignore_errors=True)
        file = shutil.copytree(tmp_path / "intact", tmp_path / "flipped") / name
        data = bytearray(file.read_bytes())
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        file.write_bytes(data)
        try:
            back = read_native(tmp_path / "flipped")
            assert (back.config, back.spec) == (CONFIG, SPEC) and same(back.params, bundle.params)
        except UserError as error:
            assert name in str(error)
            refused.append(name)
    assert refused.count("dlm.json") == refused.count(FILE) == 30


def test_a_directory_that_does_not_list_its_files_is_refused(written):
    lines = (written / SUMS).read_text().splitlines(keepends=True)
    (written / SUMS).write_text("".join(line for line in lines if FILE not in line))
    with pytest.raises(UserError, match=f"does not list {FILE}"):
        read_native(written)
    (written / SUMS).unlink()
    with pytest.raises(UserError, match=r"does not list dlm\.json"):
        read_native(written)


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="needs the command sha256sum")
def test_the_command_sha256sum_reads_the_checksums_and_writes_them(bundle, written, same):
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=written, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(f"sha256sum --binary ./*.* > {SUMS}", shell=True, cwd=written, check=True)
    assert same(read_native(written).params, bundle.params)
