"""Adapters: they start at nothing, train alone, merge and unmerge, and speak PEFT's format."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax.adapt import adapt
from dlm_jax.cli import main
from dlm_jax.config import load_config
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.peft import read_peft, write_peft
from dlm_jax.errors import UserError
from dlm_jax.language_model import load
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.card import Card
from dlm_jax.models.lora import Lora, join, merge, split, trained_table, unmerge
from dlm_jax.models.weights import flatten, unflatten
from dlm_jax.opening import open_bundle, open_tokenizer, with_mask

RANK = Lora(rank=3, alpha=6.0)


def trained_apart(random_model, family: str = "llama", lora: Lora = RANK):
    """(config, whole, trained, frozen), the adapters with random values as training leaves them."""
    config, params = random_model(family, **({"head_dim": 4} if family == "gpt2" else {}))
    trained, frozen = split(params, config, lora, jax.random.key(0))
    random = np.random.default_rng(1)
    trained = {path: random.normal(0, 0.1, w.shape).astype(np.float32) if path.startswith("lora.") else np.asarray(w)
               for path, w in flatten(trained).items()}
    return config, params, unflatten(trained), frozen


def assert_same(a, b, atol: float = 1e-6) -> None:
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_allclose(a[path], b[path], atol=atol, err_msg=path)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3"])
def test_adapters_start_at_the_base(random_model, family):
    config, params = random_model(family)
    assert_same(join(*split(params, config, RANK, jax.random.key(0)), RANK), params, atol=0)


def test_a_merged_matrix_is_w_plus_the_scaled_product(random_model):
    config, params, trained, frozen = trained_apart(random_model)
    merged, a = join(trained, frozen, RANK), trained["lora"]["layers"]
    q, o = a["attention"]["q"], a["attention"]["o"]
    np.testing.assert_allclose(merged["layers"]["attention"]["q"]["weight"], params["layers"]["attention"]["q"][
        "weight"] + 2 * np.einsum("ldr,lrhk->ldhk", q["a"], q["b"]), atol=1e-5)
    np.testing.assert_allclose(merged["layers"]["attention"]["o"]["weight"], params["layers"]["attention"]["o"][
        "weight"] + 2 * np.einsum("lhkr,lrd->lhkd", o["a"], o["b"]), atol=1e-5)
    adapters = {"lora": trained["lora"]}
    assert_same(unmerge(merge(params, adapters, 2.0), adapters, 2.0), params)


def test_what_is_trained_follows_from_the_table(random_model):
    config, _ = random_model("qwen3", tied_head=False)
    attention = set(trained_table(config, Lora(rank=2, targets="attention", whole="")))
    assert attention == {f"lora.layers.attention.{m}.{p}" for m in "qkvo" for p in "ab"}
    whole = {path for path in trained_table(config, Lora(rank=2, whole="embeddings,norms,head"))
             if not path.startswith("lora.")}
    assert {"embed.tokens", "head.weight", "final_norm.scale", "layers.attention.q_norm.scale"} <= whole
    assert not [path for path in whole if "mlp." in path]


@pytest.mark.parametrize("fields, words", [
    ({"rank": -1}, "lora.rank must not be negative"), ({"rank": 1, "alpha": 0.0}, "lora.alpha must be positive"),
    ({"targets": "attention,head"}, "'head' is not one of attention, mlp"), ({"whole": "mlp"}, "'mlp' is not one of"),
    ({"rank": 1, "targets": ""}, "lora.targets is empty")])
def test_settings_that_make_no_sense_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Lora(**fields)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_peft_directories_go_out_and_come_back(random_model, tmp_path, family):
    config, params, trained, frozen = trained_apart(random_model, family)
    write_peft(tmp_path, trained, config, RANK, "base")
    adapters, whole = read_peft(tmp_path, config)
    back = merge(unflatten({**flatten(params), **flatten(whole)}), adapters, 1.0)
    assert_same(back, join(trained, frozen, RANK), atol=1e-5)


def test_names_of_other_wrappers_are_understood_and_unknown_ones_refused(random_model, tmp_path):
    config, params, trained, frozen = trained_apart(random_model, lora=dataclasses.replace(RANK, whole=""))
    write_peft(tmp_path, trained, config, RANK, None)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace("base_model.model.model.", "base_model.model.denoise_model."): tensor
               for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert_same(merge(params, read_peft(tmp_path, config)[0], 1.0), join(trained, frozen, RANK), atol=1e-5)
    save_file({**tensors, "base_model.model.vision.lora_A.weight": np.ones((3, 4), np.float32)}, file)
    with pytest.raises(UserError, match="has no place for: base_model.model.vision"):
        read_peft(tmp_path, config)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(UserError, match="has use_dora = True, which is not built here"):
        read_peft(tmp_path, config)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_itself_reads_what_we_write(random_model, tmp_path, family):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    config, params, trained, frozen = trained_apart(random_model, family)
    write_hf(tmp_path, Bundle(config, params, Card()))
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", trained, config, RANK, str(tmp_path))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    write_hf(tmp_path, Bundle(config, jax.tree.map(np.asarray, join(trained, frozen, RANK)), Card()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(theirs(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)


def test_a_run_trains_adapters_alone_keeps_its_base_and_exports_both_ways(tiny_config, tiny_run, base, tmp_path):
    run = [*tiny_run, "train.steps=6", "checkpoint.every=3", "lora.rank=2", "optimizer.learning_rate=0.02"]
    workdir = tmp_path / "run"
    adapt(load_config(tiny_config, [*run, "train.steps=3"]), workdir)
    adapt(load_config(tiny_config, run), workdir)
    adapt(load_config(tiny_config, run), tmp_path / "unbroken")
    start, _ = with_mask(open_bundle(base), open_tokenizer(open_bundle(base)), "new")
    found, unbroken, before = (flatten(each.params) for each in (
        open_bundle(workdir), open_bundle(tmp_path / "unbroken"), start))
    for path in found:
        np.testing.assert_array_equal(found[path], unbroken[path])
        moves = path == "embed.tokens" or (path.endswith(".weight") and path.startswith("layers"))
        assert moves != np.allclose(found[path], before[path], atol=1e-7), path

    assert main(["export", str(workdir), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    assert main(["import", str(base), "--mask", "new", "--adapter", str(tmp_path / "adapter"), "--out",
                 str(tmp_path / "merged")]) == 0
    assert_same(load(tmp_path / "merged").params, load(workdir).params, atol=1e-5)
    assert main(["export", str(base), "--out", str(tmp_path / "none"), "--adapter"]) == 2


def test_adapters_and_random_weights_contradict(tiny_config, tiny_run):
    with pytest.raises(UserError, match="lora.rank adapts a base, and model.init is 'scratch'"):
        load_config(tiny_config, [*tiny_run, "lora.rank=2", "model.init=scratch"])
