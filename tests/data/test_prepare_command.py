"""`dlm prepare` passes its flags on, and reports its progress."""

import json

import pyarrow
import pytest

from dlm_jax.commands import progress
from dlm_jax.commands.main import main
from dlm_jax.data.dataset import Dataset


@pytest.fixture
def prepare(base, tmp_path, capfd):
    """Runs the command on these inputs, and returns its result and its stderr."""
    def run(*inputs, out="out", flags=()):
        code = main(["prepare", "--text", *map(str, inputs), "--model", str(base), "--length", "16", "--json",
                     "--out", str(tmp_path / out), *map(str, flags)])
        captured = capfd.readouterr()
        assert code == 0, captured.err
        return json.loads(captured.out.splitlines()[-1]), captured.err

    return run


def test_patterns_and_compressed_files_are_read(prepare, tmp_path):
    for number in range(3):
        line = json.dumps({"text": f"document {number}"}) + "\n"
        (tmp_path / f"{number}.jsonl.zst").write_bytes(pyarrow.compress(line.encode(), "zstd", asbytes=True))
    result, stderr = prepare(tmp_path / "*.jsonl.zst")
    assert (result["documents"], result["bytes"], stderr) == (3, 30, "")


def test_the_number_of_processes_changes_no_file(prepare, texts, tmp_path):
    (first, _), (second, _) = (prepare(texts, out=out, flags=["--processes", out]) for out in ("1", "3"))
    assert {**first, "out": ""} == {**second, "out": ""}
    for shard in Dataset.open(tmp_path / "1").shards:
        assert (tmp_path / "1" / shard.name).read_bytes() == (tmp_path / "3" / shard.name).read_bytes()


def test_the_field_of_the_text_can_be_chosen(prepare, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "a document", "text": "no"}\n')
    result, _ = prepare(tmp_path / "a.jsonl", flags=["--text-field", "content"])
    assert (result["documents"], result["bytes"]) == (1, len("a document"))


def test_beam_runs_with_its_flags(prepare, texts):
    pytest.importorskip("apache_beam", reason="needs `pip install dlm-jax[beam]`")
    result, _ = prepare(texts, flags=["--beam=--runner=DirectRunner --direct_num_workers=1"])
    assert result["documents"] == 60


def test_without_a_terminal_progress_is_logged_as_occasional_lines(prepare, texts, monkeypatch):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    _, stderr = prepare(texts)
    assert stderr.startswith("prepared 0 MB, ") and stderr.endswith(" MB/s\n")
