"""`dlm prepare` hands its flags on, and says how far it is."""

import json

import pyarrow
import pytest

from dlm_jax import commands
from dlm_jax.cli import main
from dlm_jax.data.dataset import Dataset


@pytest.fixture
def prepare(base, tmp_path, capfd):
    """Runs the command on these inputs; returns its result and what it said on stderr."""
    def run(*inputs, out="out", flags=()):
        code = main(["prepare", "--text", *map(str, inputs), "--model", str(base), "--length", "16", "--json",
                     "--out", str(tmp_path / out), *map(str, flags)])
        said = capfd.readouterr()
        assert code == 0, said.err
        return json.loads(said.out.splitlines()[-1]), said.err

    return run


def test_patterns_and_compressed_files_are_read(prepare, tmp_path):
    for number in range(3):
        line = json.dumps({"text": f"document {number}"}) + "\n"
        (tmp_path / f"{number}.jsonl.zst").write_bytes(pyarrow.compress(line.encode(), "zstd", asbytes=True))
    result, said = prepare(tmp_path / "*.jsonl.zst")
    assert (result["documents"], result["bytes"], said) == (3, 30, "")


def test_the_number_of_processes_changes_no_file(prepare, texts, tmp_path):
    (first, _), (second, _) = (prepare(texts, out=out, flags=["--processes", out]) for out in ("1", "3"))
    assert {**first, "out": ""} == {**second, "out": ""}
    for shard in Dataset.open(tmp_path / "1").shards:
        assert (tmp_path / "1" / shard.name).read_bytes() == (tmp_path / "3" / shard.name).read_bytes()


def test_beam_is_run_with_its_flags(prepare, texts):
    pytest.importorskip("apache_beam", reason="needs `pip install dlm-jax[beam]`")
    result, _ = prepare(texts, flags=["--beam=--runner=DirectRunner --direct_num_workers=1"])
    assert result["documents"] == 60


def test_a_line_now_and_then_says_how_far_it_is_where_there_is_no_terminal(prepare, texts, monkeypatch):
    monkeypatch.setattr(commands, "LINE_SECONDS", 0.0)
    _, said = prepare(texts)
    assert said.startswith("prepared 0 MB, ") and said.endswith(" MB/s\n")
