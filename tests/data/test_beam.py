"""Preparing with Beam writes an ordinary dataset, the same on any runner, or nothing."""

import importlib
import json
import sys

import numpy as np
import pytest

from dlm_jax.data import beam as module
from dlm_jax.data.beam import prepare_with_beam
from dlm_jax.data.dataset import Dataset
from dlm_jax.data.prepare import prepare
from dlm_jax.data.text import read_documents
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

prepare_module = importlib.import_module("dlm_jax.data.prepare")  # `dlm_jax.data.prepare` itself is the function


@pytest.fixture(scope="module")
def tokenizer(base):
    return Tokenizer.load(base)


@pytest.fixture
def inputs(tmp_path):
    """Three text files, the second without documents."""
    for number, documents in enumerate((["one cat"] * 30, [], ["two dogs", "and a hill"] * 9)):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (tmp_path / f"{number}.jsonl").write_text(lines)
    return tmp_path / "?.jsonl"


def test_a_missing_beam_names_the_package_to_install(inputs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    with pytest.raises(UserError, match=r"pip install 'dlm-jax\[beam\]'"):
        prepare_with_beam([inputs], tokenizer, 16, tmp_path / "out")


@pytest.fixture
def beam():
    pytest.importorskip("apache_beam", reason="needs `pip install dlm-jax[beam]`")


@pytest.mark.usefixtures("beam")
def test_each_input_is_packed_as_prepare_packs_it_alone(inputs, tokenizer, tmp_path):
    description = prepare_with_beam([inputs], tokenizer, 16, tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    alone = []
    for number in (0, 2):
        prepare(read_documents([tmp_path / f"{number}.jsonl"]), tokenizer, 16, tmp_path / f"alone{number}")
        alone.append(Dataset.open(tmp_path / f"alone{number}"))
    for ours, theirs in zip(dataset.rows(slice(None)), zip(*(each.rows(slice(None)) for each in alone))):
        np.testing.assert_array_equal(ours, np.concatenate(theirs))
    assert description["documents"] == dataset.documents == 48
    assert dataset.bytes == sum(each.bytes for each in alone) and dataset.tokenizer == tokenizer.fingerprint()
    assert {path.name for path in dataset.directory.iterdir()} == {"dataset.json", *(s.name for s in dataset.shards)}


@pytest.mark.usefixtures("beam")
def test_the_files_do_not_depend_on_the_number_of_workers(inputs, tokenizer, tmp_path):
    flags = ["--runner=FnApiRunner", "--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    prepare_with_beam([inputs], tokenizer, 16, tmp_path / "one")
    prepare_with_beam([inputs], tokenizer, 16, tmp_path / "two", flags)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert len(one) == 3 and one == two


def test_a_part_written_twice_leaves_the_same_files(inputs, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_module, "SHARD_BYTES", 8 * 16 * 2)
    part, out = (0, str(tmp_path / "0.jsonl")), tmp_path / "out"
    out.mkdir()
    module._write_input(part, tokenizer, 16, str(out), "text")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    module._write_input(part, tokenizer, 16, str(out), "text")
    assert len(before) > 3 and before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.usefixtures("beam")
@pytest.mark.parametrize("content, flags, words", [
    ('{"text": "a"}\n{"text": b}\n', [], "bad.jsonl, line 2 is not JSON"),
    ('{"text": "a"}\n', ["--runner=NoSuchRunner"], "the Beam pipeline failed .*NoSuchRunner")])
def test_an_error_is_reported_and_leaves_nothing(inputs, tokenizer, tmp_path, content, flags, words):
    (tmp_path / "bad.jsonl").write_text(content)
    with pytest.raises(UserError, match=words):
        prepare_with_beam([inputs, tmp_path / "bad.jsonl"], tokenizer, 16, tmp_path / "out", flags)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
