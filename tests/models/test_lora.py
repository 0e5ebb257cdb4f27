"""Adapters: they start at zero, are trained alone, merge and unmerge, and convert to and from PEFT."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax.adapt import adapt
from dlm_jax.commands.main import main
from dlm_jax.config import load_config
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.origin import Origin, weights_sha256
from dlm_jax.convert.peft import read_peft, write_peft
from dlm_jax.errors import UserError
from dlm_jax.language_model import load
from dlm_jax.loading import load_bundle, load_tokenizer, with_mask_token
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.lora import Lora, merge, merge_trained, split_trained, trained_table, unmerge
from dlm_jax.models.weights import flatten, unflatten

RANK = Lora(rank=3, alpha=6.0)
BASE = Origin("org/base", None, "0" * 64, 31, "new")


def trained_apart(random_model, family: str = "llama", lora: Lora = RANK):
    """(config, params, trained, frozen), the adapters with random values, as after training."""
    config, params = random_model(family, **({"head_dim": 4} if family == "gpt2" else {}))
    trained, frozen = split_trained(params, config, lora, jax.random.key(0))
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
    assert_same(merge_trained(*split_trained(params, config, RANK, jax.random.key(0)), RANK), params, atol=0)


def test_a_merged_matrix_is_w_plus_the_scaled_product(random_model):
    config, params, trained, frozen = trained_apart(random_model)
    merged, a = merge_trained(trained, frozen, RANK), trained["lora"]["layers"]
    q, o = a["attention"]["q"], a["attention"]["o"]
    np.testing.assert_allclose(merged["layers"]["attention"]["q"]["weight"], params["layers"]["attention"]["q"][
        "weight"] + 2 * np.einsum("ldr,lrhk->ldhk", q["a"], q["b"]), atol=1e-5)
    np.testing.assert_allclose(merged["layers"]["attention"]["o"]["weight"], params["layers"]["attention"]["o"][
        "weight"] + 2 * np.einsum("lhkr,lrd->lhkd", o["a"], o["b"]), atol=1e-5)
    adapters = {"lora": trained["lora"]}
    assert_same(unmerge(merge(params, adapters, 2.0), adapters, 2.0), params)


def test_the_trained_weights_follow_from_the_table(random_model):
    config, _ = random_model("qwen3", tied_head=False)
    attention = set(trained_table(config, Lora(rank=2, target_modules="attention", modules_to_save="")))
    assert attention == {f"lora.layers.attention.{m}.{p}" for m in "qkvo" for p in "ab"}
    saved = {path for path in trained_table(config, Lora(rank=2, modules_to_save="embeddings,norms,head"))
             if not path.startswith("lora.")}
    assert {"embed.tokens", "head.weight", "final_norm.scale", "layers.attention.q_norm.scale"} <= saved
    assert not [path for path in saved if "mlp." in path]


@pytest.mark.parametrize("fields, words", [
    ({"rank": -1}, "lora.rank must lie between 0 and"), ({"rank": 1, "alpha": 0.0}, "lora.alpha must be positive"),
    ({"target_modules": "attention,head"}, "lora.target_modules: 'head' is not one of attention, mlp"),
    ({"modules_to_save": "mlp"}, "lora.modules_to_save: 'mlp' is not one of"),
    ({"rank": 1, "target_modules": ""}, "lora.target_modules is empty")])
def test_nonsensical_settings_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        Lora(**fields)


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_peft_directories_survive_a_round_trip(random_model, tmp_path, family):
    config, params, trained, frozen = trained_apart(random_model, family)
    write_peft(tmp_path, trained, config, RANK, BASE)
    adapters, saved = read_peft(tmp_path, config)
    back = merge(unflatten({**flatten(params), **flatten(saved)}), adapters, 1.0)
    assert_same(back, merge_trained(trained, frozen, RANK), atol=1e-5)


def test_names_from_other_wrappers_are_read_and_unknown_ones_are_refused(random_model, tmp_path):
    config, params, trained, frozen = trained_apart(random_model, lora=dataclasses.replace(RANK, modules_to_save=""))
    write_peft(tmp_path, trained, config, RANK, BASE)
    file = tmp_path / "adapter_model.safetensors"
    tensors = {name.replace("base_model.model.model.", "base_model.model.denoise_model."): tensor
               for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    assert_same(merge(params, read_peft(tmp_path, config)[0], 1.0), merge_trained(trained, frozen, RANK), atol=1e-5)
    save_file({**tensors, "base_model.model.vision.lora_A.weight": np.ones((3, 4), np.float32)}, file)
    with pytest.raises(UserError, match="does not have: base_model.model.vision"):
        read_peft(tmp_path, config)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "use_dora": True}))
    with pytest.raises(UserError, match="has use_dora = True, which is not supported"):
        read_peft(tmp_path, config)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_peft_itself_reads_our_directories(random_model, tmp_path, family):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM
    config, params, trained, frozen = trained_apart(random_model, family)
    write_hf(tmp_path, Bundle(config, params, DiffusionSpec()))
    (tmp_path / "adapter").mkdir()
    write_peft(tmp_path / "adapter", trained, config, RANK,
               dataclasses.replace(BASE, name=str(tmp_path)))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path), tmp_path / "adapter")
    write_hf(tmp_path, Bundle(config, jax.tree.map(np.asarray, merge_trained(trained, frozen, RANK)), DiffusionSpec()))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(theirs(tokens).logits, merged(tokens).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_a_run_trains_only_adapters_keeps_its_base_and_exports_adapter_and_model(tiny_config, tiny_run, base, tmp_path):
    run = [*tiny_run, "train.steps=6", "checkpoint.every=3", "lora.rank=2", "optimizer.learning_rate=0.02"]
    workdir = tmp_path / "run"
    adapt(load_config(tiny_config, [*run, "train.steps=3"]), workdir)
    adapt(load_config(tiny_config, run), workdir)
    adapt(load_config(tiny_config, run), tmp_path / "unbroken")
    start, _ = with_mask_token(load_bundle(base), load_tokenizer(load_bundle(base)), "new")
    found, unbroken, before = (flatten(each.params) for each in (
        load_bundle(workdir), load_bundle(tmp_path / "unbroken"), start))
    for path in found:
        np.testing.assert_array_equal(found[path], unbroken[path])
        moves = path == "embed.tokens" or (path.endswith(".weight") and path.startswith("layers"))
        assert moves != np.allclose(found[path], before[path], atol=1e-7), path

    assert main(["export", str(workdir), "--out", str(tmp_path / "adapter"), "--adapter"]) == 0
    assert main(["import", str(base), "--mask", "new", "--adapter", str(tmp_path / "adapter"), "--out",
                 str(tmp_path / "merged")]) == 0
    assert_same(load(tmp_path / "merged").params, load(workdir).params, atol=1e-5)
    rows = load_bundle(base).config.vocab_size
    assert f"the base has {rows} rows, and the adapter belongs to a model with {rows + 1}" in (
        tmp_path / "adapter" / "README.md").read_text()
    assert main(["export", str(base), "--out", str(tmp_path / "none"), "--adapter"]) == 2


@pytest.fixture(scope="module")
def adapter_of_an_adapted_model(tiny_config, tiny_run, base, tmp_path_factory):
    """The directory of an adapter that was trained on a model with an origin of its own, and that model's directory."""
    root = tmp_path_factory.mktemp("adapter")
    settings = ["train.steps=1", "recipe.anneal_steps=0", "optimizer.warmup_steps=0", "optimizer.learning_rate=0.02"]
    adapt(load_config(tiny_config, [*tiny_run, *settings]), root / "first")
    load(root / "first").export(root / "adapted")
    second = [*tiny_run, *settings, f"model.base={root / 'adapted'}", "lora.rank=2"]
    adapt(load_config(tiny_config, second), root / "second")
    assert main(["export", str(root / "second"), "--out", str(root / "adapter"), "--adapter"]) == 0
    return root / "adapter", root / "adapted"


def test_an_adapter_names_the_model_it_was_trained_on_and_the_hash_of_its_weights(adapter_of_an_adapted_model, base):
    adapter, adapted = adapter_of_an_adapted_model
    fields = json.loads((adapter / "adapter_config.json").read_text())
    assert load_bundle(adapted).spec.base_model == base.name and fields["base_model_name_or_path"] == str(adapted)
    assert fields["dlm_jax"]["sha256"] == weights_sha256(load_bundle(adapted)) != weights_sha256(load_bundle(base))
    card = (adapter / "README.md").read_text()
    assert f'base_model: "{adapted}"' in card and fields["dlm_jax"]["sha256"] in card and "resized" not in card


def test_an_adapter_is_merged_only_into_the_weights_it_was_trained_on(adapter_of_an_adapted_model, base, tmp_path,
                                                                      capsys):
    adapter, adapted = adapter_of_an_adapted_model
    arguments = ["--adapter", str(adapter), "--mask", "new", "--out"]
    assert main(["import", str(adapted), *arguments, str(tmp_path / "merged")]) == 0
    assert main(["import", str(adapted), *arguments, str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert {leaf.dtype.name for leaf in flatten(load_bundle(tmp_path / "half").params).values()} == {"bfloat16"}
    capsys.readouterr()
    assert main(["import", str(base), *arguments, str(tmp_path / "wrong")]) == 2
    said = capsys.readouterr().err
    assert f"was trained on {adapted} (weights" in said and f"{base} holds others" in said
    assert not (tmp_path / "wrong").exists()


def test_the_hash_of_weights_does_not_depend_on_how_they_are_held_and_does_on_every_one(random_model):
    config, params = random_model("gpt2")
    half = jax.tree.map(lambda w: w.astype(jax.numpy.bfloat16), params)
    bundles = [Bundle(config, tree, DiffusionSpec()) for tree in (
        half, jax.tree.map(lambda w: np.asarray(w, np.float32), half))]
    assert weights_sha256(bundles[0]) == weights_sha256(bundles[1])
    hashes = {weights_sha256(bundles[1])}
    for path, leaf in flatten(params).items():
        changed = leaf.copy()
        changed.flat[-1] += 1
        hashes.add(weights_sha256(Bundle(config, unflatten({**flatten(params), path: changed}), DiffusionSpec())))
    assert len(hashes) == 1 + len(flatten(params))


def test_adapters_on_random_weights_are_refused(tiny_config, tiny_run):
    with pytest.raises(UserError, match="lora.rank adapts a base and model.init is 'scratch'"):
        load_config(tiny_config, [*tiny_run, "lora.rank=2", "model.init=scratch"])
