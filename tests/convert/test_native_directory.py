"""The native directory gives back what was written, and refuses what was not."""

import dataclasses
import json
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax.convert import native
from dlm_jax.convert.native import read_native, write_native
from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.weights import flatten, init

ROPE = Rope(500.0, "llama3", 8.0)
CONFIG = ModelConfig("qwen3", 96, 32, 2, 4, 2, 8, 40, 64, ROPE, "rms", 1e-6, "swiglu", qk_norm=True)
CARD = Card("same_position", "block_causal", 4, 95, 1, 2, "efficient_dlm", "org/base", "abc")
FILE = "params-00001-of-00001.safetensors"


@pytest.fixture(params=[np.float32, ml_dtypes.bfloat16])
def bundle(request) -> Bundle:
    return Bundle(CONFIG, init(CONFIG, jax.random.key(0), request.param), CARD)


@pytest.fixture
def written(bundle: Bundle, tmp_path: Path) -> Path:
    write_native(tmp_path, bundle)
    return tmp_path


def test_writing_then_reading_gives_equal_bits(bundle, written, same):
    back = read_native(written)
    assert (back.config, back.card, back.tokenizer_dir) == (CONFIG, CARD, None) and same(back.params, bundle.params)


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


def test_description_is_the_config_and_the_card(written):
    fields = json.loads((written / "dlm.json").read_text())
    assert fields == {"format": 1, "model": dataclasses.asdict(CONFIG), **dataclasses.asdict(CARD)}


@pytest.mark.parametrize(("field", "value", "culprit"), [
    ("format", 2, "not of format 1"), ("model", None, "does not describe its model"), ("rule", "all", "rule 'all'"),
    ("colour", 1, "colour"), ("mask_token_id", 96, "mask_token_id 96")])
def test_a_wrong_description_is_named(field, value, culprit, written):
    path = written / "dlm.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    with pytest.raises(UserError, match=culprit):
        read_native(written)


@pytest.mark.parametrize(("change", "culprit"), [
    ({"embed.tokens": None}, r"lacks the tensors embed\.tokens"),
    ({"extra": np.zeros(1)}, "unexpected the tensors extra"),
    ({"final_norm.scale": np.zeros(31)}, r"final_norm\.scale .* \[31\]"),
    ({"final_norm.scale": np.full(32, np.nan)}, r"final_norm\.scale .* NaN")])
def test_a_wrong_tensor_is_named(change, culprit, written):
    tensors = load_file(written / FILE)
    tensors |= {path: array.astype(np.float32) for path, array in change.items() if array is not None}
    save_file({p: a for p, a in tensors.items() if change.get(p, a) is not None}, written / FILE)
    with pytest.raises(UserError, match=culprit):
        read_native(written)


def test_a_directory_without_weights_is_named(written):
    (written / FILE).unlink()
    with pytest.raises(UserError, match="has no params"):
        read_native(written)
