"""Whatever is wrong with a checkpoint, the error names it, and nothing in it is executed."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from dlm_jax.convert import hub
from dlm_jax.convert.hf_config import model_config
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.errors import UserError
from dlm_jax.files import write_sums

NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


def drop(tensors: dict, config: dict) -> None:
    del tensors[NORM]


def add(tensors: dict, config: dict) -> None:
    tensors["model.extra.weight"] = np.zeros(3, np.float32)


def misshape(tensors: dict, config: dict) -> None:
    tensors[NORM] = np.zeros(31, np.float32)


def nan(tensors: dict, config: dict) -> None:
    tensors[EMBED][5, 5] = np.nan


def infinite(tensors: dict, config: dict) -> None:
    tensors[EMBED][5, 5] = np.inf


def integers(tensors: dict, config: dict) -> None:
    tensors[NORM] = np.zeros(32, np.int32)


def other_head(tensors: dict, config: dict) -> None:
    tensors["lm_head.weight"] = tensors[EMBED] + 1


@pytest.mark.parametrize(("edit", "culprit"), [
    (drop, f"lacks the tensors {NORM}"), (add, "unexpected tensors model.extra.weight"),
    (misshape, rf"{NORM} .* \[31\].* \[32\]"), (nan, f"{EMBED} .* NaN"), (infinite, f"{EMBED} .* infinite"),
    (integers, f"{NORM} .* I32"), (other_head, "lm_head.weight .* differs from the embedding")])
def test_a_wrong_tensor_is_named(edit, culprit, edited):
    with pytest.raises(UserError, match=culprit):
        read_hf(edited("qwen2", edit))


LLAMA = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
         "num_attention_heads": 2, "max_position_embeddings": 8}
GPT2 = {"model_type": "gpt2", "vocab_size": 8, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}


@pytest.mark.parametrize(("base", "change", "culprit"), [
    (LLAMA, {"model_type": "mixtral"}, "'mixtral' .* gpt2, llama, qwen2, qwen3"),
    (LLAMA, {"model_type": None}, "model_type None"),
    (LLAMA, {"hidden_act": "relu"}, "hidden_act: 'relu'"),
    (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
    (LLAMA, {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "rope type 'longrope'"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32}}, "'beta_fast': 32"),
    (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
    (LLAMA, {"rope_scaling": {"type": "linear"}}, "does not state factor"),
    (LLAMA, {"rope_scaling": {"type": "linear"}, "rope_parameters": {"rope_type": "default"}}, "contradict"),
    (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor: 0.5"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor: 0.5"),
    (LLAMA, {"quantization_config": {"bits": 4}}, "quantization_config: {'bits': 4}"),
    (LLAMA, {"num_local_experts": 8}, "num_local_experts: 8"),
    (LLAMA, {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window: True"),
    (LLAMA, {"model_type": "qwen3", "layer_types": ["sliding_attention"]}, "layer_types names 'sliding_attention'"),
    (LLAMA, {"hidden_size": None}, "does not state hidden_size"),
    (LLAMA, {"hidden_size": "8"}, "hidden_size: '8'"),
    (LLAMA, {"rope_theta": "1e4"}, "rope_theta: '1e4'"),
    (LLAMA, {"rms_norm_eps": "tiny"}, "rms_norm_eps: 'tiny'"),
    (LLAMA, {"num_attention_heads": 3}, "hidden_size 8 is not a multiple of num_attention_heads 3"),
    (LLAMA, {"num_key_value_heads": 4}, "2 heads cannot share 4"),
    (GPT2, {"activation_function": "relu"}, "activation_function: 'relu'"),
    (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx: True"),
    (GPT2, {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn: True"),
    (GPT2, {"scale_attn_weights": False}, "scale_attn_weights: False"),
    (GPT2, {"add_cross_attention": True}, "add_cross_attention: True")])
def test_an_unsupported_field_is_named_with_its_value(base, change, culprit):
    model_config(base)
    with pytest.raises(UserError, match=culprit):
        model_config(base | change)


def test_harmless_fields_are_accepted():
    model_config(LLAMA | {"pretraining_tp": 2, "sliding_window": 4096, "use_sliding_window": False,
                          "layer_types": ["full_attention"], "rope_scaling": None, "some_future_field": 1})


def test_heads_need_not_divide_the_width_if_head_dim_is_stated():
    config = model_config(LLAMA | {"num_attention_heads": 3, "head_dim": 6})
    assert (config.heads, config.head_dim) == (3, 6)
    assert model_config(LLAMA | {"model_type": "qwen3"}).head_dim == 128


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_named(keep, edited):
    file = edited("qwen2", lambda tensors, config: None) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"model\.safetensors is not a complete safetensors file"):
        read_hf(file.parent)


def test_pickles_are_refused_and_not_opened(tmp_path, tiny):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(tiny("qwen2").directory / "config.json", directory)
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match=r"pytorch_model\.bin, a pickle.*convert it to safetensors"):
        read_hf(directory)
    assert not (tmp_path / "executed").exists()


def shard(directory: Path) -> dict:
    """Splits the checkpoint's single file in two, and returns the index."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    files = {"a.safetensors": names[:4], "b.safetensors": names[4:]}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, directory / file)
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_missing_shard_is_named(edited):
    directory = edited("qwen2", lambda tensors, config: None)
    shard(directory)
    read_hf(directory)
    (directory / "b.safetensors").unlink()
    with pytest.raises(UserError, match=r"b\.safetensors"):
        read_hf(directory)


def test_a_tensor_in_two_shards_is_named(edited):
    directory = edited("qwen2", lambda tensors, config: None)
    index = shard(directory)
    shutil.copy(directory / "a.safetensors", directory / "c.safetensors")
    index["weight_map"]["again"] = "c.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"tensor \S+ is in both a\.safetensors and c\.safetensors"):
        read_hf(directory)


def test_an_index_cannot_leave_its_directory(edited):
    directory = edited("qwen2", lambda tensors, config: None)
    index = shard(directory)
    index["weight_map"]["again"] = "../outside.safetensors"
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"\.\./outside\.safetensors"):
        read_hf(directory)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_broken_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json"):
        read_hf(tmp_path)


def test_an_empty_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"has no config\.json"):
        read_hf(tmp_path)


@pytest.mark.parametrize(("changes", "culprit"), [
    ({"mask_token_id": 96}, "mask_token_id 96 is not in the vocabulary of 96"), ({"rule": "all"}, "rule: 'all'"),
    ({"color": 1}, "color"), ({"rule": "bidirectional"}, "set mask_token_id"),
    ({"bos_token_id": -1}, "bos_token_id -1 is not in the vocabulary of 96"),
    ({"eos_token_id": 50256}, "eos_token_id 50256 is not in the vocabulary of 96"),
    ({"eos_token_id": "2"}, "eos_token_id: '2', which is not of type int"),
    ({"base_model": ["a"]}, r"base_model: \['a'\], which is not of type str")])
def test_wrong_spec_changes_are_named(changes, culprit, tiny):
    with pytest.raises(UserError, match=culprit):
        read_hf(tiny("qwen2").directory, spec_changes=changes)


def test_only_float32_and_bfloat16_are_held(tiny):
    with pytest.raises(UserError, match="not in float16"):
        read_hf(tiny("qwen2").directory, dtype="float16")


def test_a_directory_is_returned_unchanged(tmp_path):
    assert hub.fetch(tmp_path) == (tmp_path, None)


@pytest.mark.parametrize(("make", "source", "culprit"), [
    (True, "file", "is a file"), (False, "a/b/c", "there is no directory"), (False, "name", "there is no directory")])
def test_a_source_that_is_neither_directory_nor_hub_id_is_refused(make, source, culprit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if make:
        Path(source).touch()
    with pytest.raises(UserError, match=culprit):
        hub.fetch(source)


def test_a_failed_download_says_how_to_continue_without_a_network(monkeypatch):
    def refuse(*arguments, **settings):
        raise ConnectionError("no route")

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match="org/name.*ConnectionError.*name its directory"):
        hub.fetch("org/name")


def test_a_download_excludes_pickles_and_reports_its_commit(monkeypatch, tmp_path):
    requested = {}

    def download(source, allow_patterns):
        requested.update(source=source, patterns=allow_patterns)
        return str(tmp_path / ("a" * 40))

    monkeypatch.setattr(hub.huggingface_hub, "snapshot_download", download)
    assert hub.fetch("org/name") == (tmp_path / ("a" * 40), "a" * 40)
    assert requested == {"source": "org/name", "patterns": ["*.safetensors", "*.json", "*.txt", "*.model"]}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "model.safetensors"])
def test_a_file_that_differs_from_the_checksum_beside_it_is_named(edited, name):
    directory = edited("qwen2", lambda tensors, config: None)
    write_sums(directory)
    read_hf(directory)
    data = bytearray((directory / name).read_bytes())
    data[-3] ^= 1
    (directory / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged: it differs from its checksum in SHA256SUMS"):
        read_hf(directory)


def test_files_that_are_not_read_may_differ_from_their_checksum_or_be_absent(edited):
    directory = edited("qwen2", lambda tensors, config: None)
    (directory / "README.md").write_text("A model.")
    (directory / "pytorch_model.bin").write_text("A pickle.")
    write_sums(directory)
    (directory / "README.md").write_text("A good model.")
    (directory / "pytorch_model.bin").unlink()
    read_hf(directory)


def test_checksums_that_cannot_be_read_are_refused(edited):
    directory = edited("qwen2", lambda tensors, config: None)
    (directory / "SHA256SUMS").write_text("SHA256 (config.json) = 00\n")
    with pytest.raises(UserError, match="SHA256SUMS is damaged: it has the line"):
        read_hf(directory)
