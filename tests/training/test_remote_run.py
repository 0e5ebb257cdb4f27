"""A run in an object store needs nothing that one machine keeps. The store is a folder behind a file:// URL; the same
code reaches others through fsspec and Orbax."""

import shutil
import signal
import subprocess
import time

import pytest

from dlm_jax.loading import load_bundle

pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.mark.slow
def test_a_run_in_a_store_resumes_on_another_machine(runs, tiny_config, tiny_run, unbroken, tmp_path, monkeypatch):
    store, cache = tmp_path / "bucket" / "run", tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    run = runs.command(tiny_config, tiny_run, f"file://{store}")
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not (store / "checkpoints" / "10").exists():
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.read()
    assert process.returncode == 143, said
    assert {"config.json", "model.json", "metrics.jsonl", "tokenizer"} <= {path.name for path in store.iterdir()}
    shutil.rmtree(cache)
    assert subprocess.run(run, capture_output=True).returncode == 0
    assert runs.records(store) == runs.records(unbroken) and runs.same_weights(store, unbroken)
    bundle = load_bundle(f"file://{store}")
    assert bundle.config.vocab_size == load_bundle(unbroken).config.vocab_size and bundle.tokenizer_dir.is_dir()
