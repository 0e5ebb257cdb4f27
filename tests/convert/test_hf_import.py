"""An imported model is the same function as the transformers model, however it is stored."""

import json

import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dlm_jax.attention.rules import Causal
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import weight_table

MODELS = ["gpt2", "llama3", "llama_linear", "llama_biased", "qwen2", "qwen3"]


@pytest.mark.parametrize("name", MODELS)
def test_causal_logits_equal_those_of_transformers(name, tiny, tokens, our_logits, their_logits):
    bundle = read_hf(tiny(name).directory)
    assert set(flatten_dict(bundle.params, sep=".")) == set(weight_table(bundle.config))
    np.testing.assert_allclose(our_logits(bundle, tokens, Causal()), their_logits(tiny(name).model, tokens), atol=1e-4)


def test_a_trained_model_has_the_logits_of_transformers(shared, our_logits, their_logits):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torch")
    directory = shared / "stories260k"
    tokens = np.random.default_rng(1).integers(3, 512, (2, 64))
    bundle = read_hf(directory)
    assert (bundle.spec.bos_token_id, bundle.spec.eos_token_id, bundle.tokenizer_dir) == (1, 2, directory)
    theirs = their_logits(transformers.AutoModelForCausalLM.from_pretrained(directory), tokens)
    np.testing.assert_allclose(our_logits(bundle, tokens, Causal()), theirs, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_shards_and_one_file_give_equal_bits(name, tiny, tmp_path, same):
    tiny(name).model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert same(read_hf(tmp_path).params, read_hf(tiny(name).directory).params)


@pytest.mark.parametrize("name", ["gpt2", "llama_linear"])
def test_tensor_names_of_the_bare_transformer_are_read(name, tiny, edited, same):
    def strip(tensors: dict, config: dict) -> None:
        for key in list(tensors):
            tensors[key.removeprefix("transformer.").removeprefix("model.")] = tensors.pop(key)

    assert same(read_hf(edited(name, strip)).params, read_hf(tiny(name).directory).params)


def test_known_buffers_and_an_equal_stored_head_are_ignored(tiny, edited, same):
    def add(tensors: dict, config: dict) -> None:
        tensors["transformer.h.0.attn.bias"] = np.ones((1, 1, 64, 64), bool)
        tensors["transformer.h.0.attn.masked_bias"] = np.array(-1e9, np.float32)
        tensors["lm_head.weight"] = tensors["transformer.wte.weight"].copy()

    assert same(read_hf(edited("gpt2", add)).params, read_hf(tiny("gpt2").directory).params)


def test_old_rope_fields_mean_the_same_as_new_ones(tiny, edited):
    def age(tensors: dict, config: dict) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        config["rope_scaling"] = rope

    assert read_hf(edited("llama3", age)).config == read_hf(tiny("llama3").directory).config


@pytest.mark.parametrize(("stored", "requested", "held"), [
    (np.float16, None, np.float32), (ml_dtypes.bfloat16, None, ml_dtypes.bfloat16), (np.float32, None, np.float32),
    (np.float32, "bfloat16", ml_dtypes.bfloat16), (ml_dtypes.bfloat16, "float32", np.float32)])
def test_the_stored_type_is_kept_or_changed_on_request(stored, requested, held, edited):
    def cast(tensors: dict, config: dict) -> None:
        tensors.update({key: value.astype(stored) for key, value in tensors.items()})

    leaves = flatten_dict(read_hf(edited("qwen2", cast), dtype=requested).params).values()
    assert {leaf.dtype for leaf in leaves} == {np.dtype(held)}


def test_mixed_stored_types_become_the_widest(edited):
    def cast(tensors: dict, config: dict) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(ml_dtypes.bfloat16)

    leaves = flatten_dict(read_hf(edited("qwen2", cast)).params).values()
    assert {leaf.dtype for leaf in leaves} == {np.dtype(np.float32)}


def test_the_first_of_several_end_tokens_comes_from_the_generation_config(edited):
    def forget(tensors: dict, config: dict) -> None:
        config["eos_token_id"] = None

    directory = edited("llama3", forget)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 8]}))
    assert read_hf(directory).spec.eos_token_id == 7


def test_the_user_adds_what_a_plain_checkpoint_does_not_state(tiny):
    changes = {"recipe": "diffullama", "rule": "bidirectional", "mask_token_id": 81}
    spec = read_hf(tiny("llama3").directory, spec_changes=changes).spec
    assert spec == DiffusionSpec(**changes, bos_token_id=1, eos_token_id=2)
