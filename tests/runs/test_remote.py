"""Work directories in an object store: only a URL leads there, and what is no run, or cannot be reached, is refused."""

import shutil

import pytest

from dlm_jax.adapt import adapt
from dlm_jax.commands.main import main
from dlm_jax.config import load_config
from dlm_jax.errors import UserError
from dlm_jax.runs.remote import checkpoints_of, fetch, push


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_store_that_holds_no_run_or_cannot_be_reached_is_refused(tmp_path):
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        fetch(f"file://{tmp_path / 'bucket'}")
    with pytest.raises(UserError, match="(cannot reach|needs a package that is not installed)"):
        fetch("az://bucket/run")


@pytest.mark.parametrize("url", ["memory://x", "nowhere://bucket/run", "http://host/run", "gs://", "file:///", "://x"])
def test_a_url_at_which_no_run_can_be_is_refused_in_one_sentence(tiny_config, tmp_path, monkeypatch, capfd, url):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    assert main(["train", "--config", str(tiny_config), "--workdir", url]) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"dlm: no run can be at {url}; name a directory, or a URL") and said.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_no_file_in_a_directory_leads_reads_writes_or_deletions_away(tiny_config, tiny_run, tmp_path, compiled_once):
    config = load_config(tiny_config, [*tiny_run, "train.steps=2", "checkpoint.every=1", "recipe.anneal_steps=0",
                                       "optimizer.warmup_steps=0"])
    adapt(config, tmp_path / "victim")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "victim").rglob("*")}
    planted = tmp_path / "planted"
    planted.mkdir()
    for pointer in (f"file://{tmp_path / 'victim'}", str(tmp_path / "victim")):
        (planted / "remote").write_text(pointer)
        with pytest.raises(UserError, match="planted is not empty and holds no run"):
            adapt(config, planted)
    shutil.copytree(tmp_path / "victim", planted, dirs_exist_ok=True)
    shutil.rmtree(planted / "checkpoints")
    adapt(config, planted)
    push(planted)
    assert str(checkpoints_of(planted)) == str(planted / "checkpoints")
    assert {path.name for path in (planted / "checkpoints").iterdir()} == {"1", "2"}
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "victim").rglob("*")}
