"""Inputs of every kind are read: compressed, by pattern, from an object store, from TFDS; bad ones are named."""

import bz2
import gzip
import json
import lzma
import subprocess
import sys
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from dlm_jax.data.inputs import expand
from dlm_jax.data.text import read_documents
from dlm_jax.errors import UserError

TEXTS = ["One.\n", "Zwei Wörter\r\n\r\nund \u2028 mehr.", "三"]


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.fixture
def contents(tmp_path) -> dict[str, bytes]:
    """TEXTS under names of every kind."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
    plain = "\n<|endoftext|>\n".join(TEXTS).encode()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "table")
    return {"a.jsonl": lines, "b.jsonl.gz": gzip.compress(lines), "c.jsonl.zst": zstd(lines), "d.txt": plain,
            "e.txt.gz": gzip.compress(plain), "f.txt.zst": zstd(plain), "f.txt.bz2": bz2.compress(plain),
            "f.txt.xz": lzma.compress(plain), "g.parquet": (tmp_path / "table").read_bytes(),
            "h.jsonl.zst": zstd(lines[:40]) + zstd(lines[40:])}  # compressed in two pieces


def test_every_compression_gives_the_same_documents(tmp_path, contents):
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        assert list(read_documents([tmp_path / name])) == TEXTS, name


def test_an_object_store_gives_the_same_documents(contents):
    store = fsspec.filesystem("memory")
    for name, content in contents.items():
        store.pipe(f"/bucket/{name}", content)
        assert list(read_documents([f"memory://bucket/{name}"])) == TEXTS, name
    assert list(read_documents(["memory://bucket/?.jsonl*"])) == TEXTS * 4
    assert list(read_documents(["memory://bucket/*.jsonl", "memory://bucket/d.txt"])) == TEXTS * 2


def test_a_pattern_expands_to_its_files_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "c.md", "a[1].txt", "deep/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert list(read_documents([tmp_path / "c.md", tmp_path / "?.txt"])) == ["c.md", "a.txt", "b.txt"]
    assert list(read_documents([tmp_path / "a[1].txt"])) == ["a[1].txt"]  # a file of exactly that name exists
    assert list(read_documents([tmp_path / "**" / "d.txt"])) == ["deep/d.txt"]


@pytest.mark.parametrize("name, words", [
    ("nothing-*.txt", r"no file nothing-\*.txt"), ("/tmp", "no file /tmp"),
    ("memory://bucket/absent.txt", "no file memory://bucket/absent.txt"),
    ("color://bucket/a.txt", "cannot reach color://bucket/a.txt")])
def test_a_missing_input_is_named_before_anything_is_read(name, words):
    with pytest.raises(UserError, match=words):
        read_documents([name])


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    for module in ("gcsfs", "s3fs"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=r"gs://bucket/a.txt needs a package .*; pip install gcsfs"):
        expand(["gs://bucket/a.txt"])
    with pytest.raises(UserError, match=r"s3://bucket/a.txt needs a package .*; pip install s3fs"):
        expand(["s3://bucket/a.txt"])


@pytest.mark.parametrize("name, content, words", [
    ("a.jsonl.zst", zstd(b'{"text": "good"}\n{"text": \n'), "a.jsonl.zst, line 2 is not JSON"),
    ("a.txt.gz", gzip.compress(b"good\nb\xe4d\n", mtime=0), "a.txt.gz, line 2 is not UTF-8"),
    ("a.jsonl.zst", zstd(b'{"text": "a"}\n' * 99)[:-9], "cannot read .*a.jsonl.zst"),
    ("a.jsonl.zst", b"{}", "cannot read .*a.jsonl.zst"),
    ("a.txt.gz", gzip.compress(b"a" * 99, mtime=0)[:-9], "cannot read .*a.txt.gz")])
def test_a_bad_compressed_file_is_named_with_its_line(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(read_documents([tmp_path / name]))


BUILDER = """
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    url_infos = {}  # nothing is downloaded
    def _info(self):
        texts = tfds.features.FeaturesDict({"text": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=texts, disable_shuffling=True)
    def _split_generators(self, manager):
        return {"train": self._generate_examples(["One.", "Zwei Wörter", "三"]), "test": self._generate_examples(["t"])}
    def _generate_examples(self, texts):
        yield from enumerate({"text": text} for text in texts)
class Numbers(Tiny):
    def _info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict({"n": tfds.features.Text()}))
    def _generate_examples(self, texts):
        yield from enumerate({"n": text} for text in texts)
"""
BUILD = """
import sys
from builders.tiny import Numbers, Tiny
for builder in (Tiny, Numbers):
    builder(data_dir=sys.argv[1], file_format="array_record").download_and_prepare()
"""
READ = """
import json, sys
from dlm_jax.data.text import read_documents
from dlm_jax.errors import UserError
for name in sys.argv[1:]:
    try:
        print(json.dumps(list(read_documents([name]))))
    except UserError as error:
        print(error)
assert "tensorflow" not in sys.modules
"""


def python(script: str, *arguments: object, **variables: object) -> list[str]:
    """The lines that a separate process prints: TFDS reads TFDS_DATA_DIR when it is imported."""
    environment = {"PATH": "/usr/bin:/bin", **{name: str(value) for name, value in variables.items()}}
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_tfds_datasets_are_read_without_tensorflow(tmp_path):
    package, data = tmp_path / "builders", tmp_path / "tfds"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "tiny.py").write_text(BUILDER)
    python(BUILD, data, PYTHONPATH=tmp_path)
    names = ["tfds:tiny", "tfds:tiny:test", "tfds:tiny:1.0.0", "tfds:tiny:1.0.0:test", "tfds:tiny:train[1:]"]
    bad = ["tfds:tiny:dev", "tfds:absent", "tfds:", "tfds:numbers"]
    lines = python(READ, *names, *bad, TFDS_DATA_DIR=data, PYTHONPATH=Path(__file__).parents[2])
    documents = ["One.", "Zwei Wörter", "三"]
    assert list(map(json.loads, lines[:5])) == [documents, ["t"], documents, ["t"], documents[1:]]
    causes = ("Unknown split 'dev'", "absent not found", "not of the form", "no feature 'text'")
    assert all(cause in line for cause, line in zip(causes, lines[5:], strict=True))
