"""Preparing writes all of the text, in any number of shards, or nothing."""

import importlib
import itertools
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from dlm_jax.data.dataset import Dataset, check_tokenizer
from dlm_jax.data.pack import pack
from dlm_jax.data.prepare import prepare
from dlm_jax.data.text import read_documents
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError

module = importlib.import_module("dlm_jax.data.prepare")  # `dlm_jax.data.prepare` itself is the function
TEXTS = ["ab", "Wörter", "", "once upon a time"] * 5


def test_every_token_is_written_in_order(tmp_path, characters, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 8 * 5 * 3)
    monkeypatch.setattr(module, "BATCH_DOCUMENTS", 3)
    description = prepare(iter(TEXTS), characters, 5, tmp_path / "out")
    expected = list(pack(characters.encode_batch(TEXTS), 5, 1, None))
    tokens, segments = Dataset.open(tmp_path / "out").rows(slice(None))
    np.testing.assert_array_equal(tokens, [each for each, _ in expected])
    np.testing.assert_array_equal(segments, [each for _, each in expected])
    assert [shard["records"] for shard in description["shards"]] == [3] * 9 + [1]


def test_the_description_counts_what_was_written(tmp_path, characters):
    description = prepare(TEXTS, characters, 5, tmp_path / "out")
    assert description == json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert description == {
        "format": 1, "length": 5, "documents": 20, "bytes": sum(len(text.encode()) for text in TEXTS),
        "tokens": sum(len(text) + 1 for text in TEXTS), "records": 28, "tokenizer": "characters", "bos_id": 1,
        "eos_id": None, "shards": [{"name": "records-00000.array_record", "records": 28}]}


def test_progress_counts_bytes_up_to_all_of_them(tmp_path, characters, monkeypatch):
    monkeypatch.setattr(module, "BATCH_BYTES", 20)
    done = []
    description = prepare(TEXTS, characters, 5, tmp_path / "out", done.append)
    assert done == sorted(done) and len(done) > 3 and done[-1] == description["bytes"]


def test_documents_are_read_only_when_needed(tmp_path, characters, monkeypatch):
    """So memory stays constant: a shard reaches the disk long before the last document is read."""
    monkeypatch.setattr(module, "SHARD_BYTES", 8 * 5)
    monkeypatch.setattr(module, "BATCH_BYTES", 20)
    seen = []

    def documents():
        for text in TEXTS:
            seen.append(len(list(tmp_path.glob(".out.*/*.array_record"))))
            yield text

    prepare(documents(), characters, 5, tmp_path / "out")
    assert seen[0] == 0 and seen[-1] > 15


def test_a_failure_leaves_nothing(tmp_path, characters):
    def documents():
        yield from TEXTS
        raise UserError("the text is at fault")

    with pytest.raises(UserError, match="the text is at fault"):
        prepare(documents(), characters, 5, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def run(script, **values):
    """Runs Python source that may import this folder's conftest, and returns its exit code."""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    return subprocess.run([sys.executable, "-c", script.format(**values)], env=environment, check=False).returncode


def test_a_kill_leaves_nothing_that_looks_complete(tmp_path):
    assert -signal.SIGKILL == run("""
import importlib, os, signal
from conftest import CharacterTokenizer
module = importlib.import_module("dlm_jax.data.prepare")
module.SHARD_BYTES, module.BATCH_BYTES = 40, 20
def documents():
    yield from ["once upon a time"] * 20
    os.kill(os.getpid(), signal.SIGKILL)
module.prepare(documents(), CharacterTokenizer(), 5, {out!r})
""", out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    leftover, = tmp_path.iterdir()
    assert list(leftover.glob("*.array_record"))
    with pytest.raises(UserError, match="is not a prepared dataset"):
        Dataset.open(leftover)


def test_a_full_disk_is_a_user_error(tmp_path):
    assert 7 == run("""
import resource
from conftest import CharacterTokenizer
from dlm_jax.data.prepare import prepare
from dlm_jax.data.text import read_documents
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    prepare(["".join(map(chr, range(300, 9000)))], CharacterTokenizer(), 64, {out!r})
except UserError as error:
    raise SystemExit(7 * ("cannot write" in str(error) and "free space" in str(error)))
""", out=str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("texts, length, named", [
    (TEXTS, 1, "a record of 1 tokens"),
    ([], 5, "the documents hold no text"),
])
def test_a_bad_request_is_refused(tmp_path, characters, texts, length, named):
    with pytest.raises(UserError, match=named):
        prepare(texts, characters, length, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_directory_in_use_is_not_touched(tmp_path, characters):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(UserError, match="out already exists"):
        prepare(TEXTS, characters, 5, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "kept"


def test_stories_are_recovered_from_their_records(tmp_path, shared):
    tokenizer = Tokenizer.load(shared / "stories260k")
    stories = list(itertools.islice(read_documents([shared / "tinystories" / "tinystories_val.jsonl"]), 10))
    prepare(stories, tokenizer, 64, tmp_path / "out")
    dataset = Dataset.open(tmp_path / "out")
    check_tokenizer(dataset, tokenizer.with_mask(id=tokenizer.size))
    tokens, segments = dataset.rows(slice(None))
    stream = tokens[segments > 0]
    documents = np.split(stream, np.flatnonzero(stream == tokenizer.bos_id))[1:]
    assert [tokenizer.decode(document) for document in documents] == stories
    assert all(document[-1] == tokenizer.eos_id for document in documents)
