"""Every kind of model can be named, and nothing is lost on the way from one kind to another."""

import json
import shutil

import jax
import numpy as np
import pytest

from dlm_jax.convert.hf_import import read_hf
from dlm_jax.loading import load_bundle
from dlm_jax.models.weights import flatten

pytestmark = pytest.mark.usefixtures("compiled_once")


def same(a, b) -> bool:
    a, b = flatten(a.params), flatten(b.params)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def json_of(result) -> dict:
    """The JSON object in the last line of stdout."""
    assert result.code == 0, result.err
    return json.loads(result.out.splitlines()[-1])


def test_import_and_export_give_back_the_same_bits_and_tokenizer(dlm, base, tmp_path):
    description = json_of(dlm("import", base, "--out", tmp_path / "native", "--json"))
    assert description == {"out": str(tmp_path / "native"), "family": "llama", "mask_token_id": None, "rule": "causal",
                           "parameters": description["parameters"], "alignment": "shifted", "block_size": None}
    exported = json_of(dlm("export", tmp_path / "native", "--out", tmp_path / "hf", "--json"))
    assert exported == {"out": str(tmp_path / "hf"), "layout": "ar",
                        "engines": "vLLM, SGLang, llama.cpp (convert_hf_to_gguf.py)"}
    original, native, exported = (load_bundle(path) for path in (base, tmp_path / "native", tmp_path / "hf"))
    assert same(original, native) and same(original, exported)
    assert original.spec.bos_token_id == exported.spec.bos_token_id == 0
    a, b = (json.loads((path / "tokenizer.json").read_text())["model"] for path in (base, tmp_path / "hf"))
    assert a == b


def test_import_adds_a_mask_row_at_the_mean(dlm, base, tmp_path):
    before = read_hf(base)
    v = before.config.vocab_size
    assert json_of(dlm("import", base, "--out", tmp_path / "m", "--mask", "new", "--json"))["mask_token_id"] == v
    after = load_bundle(tmp_path / "m")
    assert after.config.vocab_size == v + 1
    table, old = after.params["embed"]["tokens"], before.params["embed"]["tokens"]
    np.testing.assert_array_equal(table[:v], old)
    np.testing.assert_allclose(table[v], old.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(after.params["head"]["weight"][:, v], before.params["head"]["weight"].mean(1), rtol=1e-5,
                               atol=1e-7)


def test_import_reuses_a_row_as_the_mask(dlm, base, tmp_path):
    assert json_of(dlm("import", base, "--out", tmp_path / "m", "--mask", "17", "--json"))["mask_token_id"] == 17
    assert same(load_bundle(tmp_path / "m"), load_bundle(base))


def test_import_takes_the_recipe_of_a_model_from_its_user(dlm, base, tmp_path):
    description = json_of(dlm("import", base, "--out", tmp_path / "m", "--recipe", "diffullama", "--mask", "17",
                              "--json"))
    assert (description["rule"], description["alignment"]) == ("bidirectional", "shifted")
    spec = load_bundle(tmp_path / "m").spec
    assert (spec.recipe, spec.mask_token_id, spec.base_model) == ("diffullama", 17, base.name)


def test_import_stores_the_requested_dtype(dlm, base, tmp_path):
    dlm("import", base, "--out", tmp_path / "m", "--dtype", "bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(load_bundle(tmp_path / "m").params)} == {"bfloat16"}


def test_export_of_a_run_reads_back_as_the_diffusion_model_it_is(dlm, workdir, base, tmp_path):
    json_of(dlm("export", workdir, "--out", tmp_path / "hf", "--json"))
    ours, exported = load_bundle(workdir), load_bundle(tmp_path / "hf")
    assert same(ours, exported) and ours.spec == exported.spec
    assert (ours.spec.rule, ours.spec.recipe, ours.spec.base_model) == ("bidirectional", "diffullama", base.name)
    json_of(dlm("import", tmp_path / "hf", "--out", tmp_path / "native", "--json"))
    assert same(ours, load_bundle(tmp_path / "native"))


def test_the_card_of_a_run_states_the_bound_of_the_exported_checkpoint_and_no_other(dlm, workdir, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(workdir, run)
    last = json.loads((run / "validation.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
    dlm("export", run, "--out", tmp_path / "hf")
    row = f"| `validation NELBO, nats per token` | {last['nelbo']:.4g} |"
    assert row in (tmp_path / "hf" / "README.md").read_text()
    (run / "validation.jsonl").write_text('{"step": 1, "nelbo": 1.5}\ngarbage\n')
    dlm("export", run, "--out", tmp_path / "later")
    assert "validation NELBO" not in (tmp_path / "later" / "README.md").read_text()


def test_a_work_directory_is_only_read(dlm, workdir):
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}
    assert dlm("sample", workdir, "--max-tokens", 4).code == 0
    assert before == {path: path.stat().st_mtime_ns for path in workdir.rglob("*")}


def test_the_three_kinds_of_directory_give_the_same_samples_and_bounds(dlm, workdir, texts, tmp_path):
    dlm("export", workdir, "--out", tmp_path / "hf")
    dlm("import", tmp_path / "hf", "--out", tmp_path / "native")
    models = (workdir, tmp_path / "hf", tmp_path / "native")
    samples = [json_of(dlm("sample", m, "--prompt", "the cat", "--max-tokens", 8, "--json")) for m in models]
    holes = [json_of(dlm("infill", m, "the [MASK:4] mat", "--json")) for m in models]
    bounds = [json_of(dlm("eval", m, "--tasks", "nelbo", "--text", texts, "--limit", 3, "--json")) for m in models]
    for results in (samples, holes, bounds):
        for result in results:
            for measured in ("seconds", "tokens_per_second", "peak_bytes"):
                result.pop(measured, None)
        assert results[0] == results[1] == results[2]
    assert samples[0]["text"].startswith("the cat") and samples[0]["new_tokens"] <= 8
    assert holes[0]["text"].startswith("the ") and holes[0]["text"].endswith(" mat")
    assert (bounds[0]["task"], bounds[0]["texts"]) == ("nelbo", 3) and bounds[0]["nats_per_token"] > 0


def test_an_export_has_the_requested_dtype(dlm, base, tmp_path):
    json_of(dlm("export", base, "--out", tmp_path / "half", "--dtype", "bfloat16", "--json"))
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    refused = dlm("export", base, "--out", tmp_path / "adapter", "--dtype", "bfloat16", "--adapter")
    assert refused.code == 2 and "not allowed with" in refused.err and not (tmp_path / "adapter").exists()


def test_the_nll_of_an_autoregressive_model(dlm, base, texts):
    result = json_of(dlm("eval", base, "--tasks", "ar_nll", "--text", texts, "--limit", 2, "--json"))
    assert 0 < result["nats_per_token"] < 50 and result["texts"] == 2 and result["tokens"] > 10


def test_the_nelbo_of_an_autoregressive_model_reports_what_is_used_as_its_mask(dlm, base, texts):
    result = dlm("eval", base, "--tasks", "nelbo", "--text", texts, "--limit", 2)
    assert "no mask token" in result.err and result.out.startswith("task: nelbo\nnats_per_token: ")


def test_the_bundled_model_answers_to_its_name(dlm):
    result = dlm("sample", "bundled", "--prompt", "import ", "--max-tokens", 4)
    assert result.code == 0 and result.out.startswith("import ")


def test_a_file_called_model_json_alone_does_not_make_a_run(dlm, base, tmp_path):
    copy = shutil.copytree(base, tmp_path / "copy")
    (copy / "model.json").write_text("{}")
    assert dlm("sample", copy, "--prompt", "the", "--max-tokens", 2).code == 0


def test_prepare_describes_what_it_wrote(dlm, base, texts, tmp_path):
    result = json_of(dlm("prepare", "--text", texts, "--model", base, "--length", 16, "--out", tmp_path / "d",
                         "--json"))
    assert result["documents"] == 60 and result["length"] == 16 and result["records"] * 16 >= result["tokens"]


def test_train_ends_with_its_outcome(dlm, tiny_config, workdir, tiny_run):
    short = ["train.steps=2", "recipe.anneal_steps=0", "optimizer.warmup_steps=0"]
    result = json_of(dlm("train", "--config", tiny_config, "--workdir", workdir, "--json",
                      *(f"--config.{o}" for o in [*tiny_run, *short])))
    assert result["steps"] == 2 and result.keys() == {
        "workdir", "steps", "nelbo_before", "nelbo_after", "seconds", "goodput", "skipped"}
