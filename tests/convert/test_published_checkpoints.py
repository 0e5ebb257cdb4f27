"""Published diffusion checkpoints, rebuilt at tiny size, are recognized and read correctly."""

import dataclasses
import json

import numpy as np
import pytest

from dlm_jax.convert.hf_import import read_hf
from dlm_jax.convert.published import recognize
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.models.diffusion_spec import DiffusionSpec


def rename(tensors: dict, *pairs: tuple[str, str]) -> None:
    for name in list(tensors):
        new = name
        for old, replacement in pairs:
            new = new.replace(old, replacement)
        tensors[new] = tensors.pop(name)


def to_diffugpt(tensors: dict, config: dict) -> None:
    rename(tensors, ("transformer.wte.", "embed_tokens."), ("transformer.", "denoise_model."))
    config["mask_token_id"] = 95


def test_a_diffugpt_checkpoint_is_a_bidirectional_gpt2(tiny, edited, same):
    bundle, base = read_hf(edited("gpt2", to_diffugpt)), read_hf(tiny("gpt2").directory)
    assert same(bundle.params, base.params) and bundle.config == base.config
    assert bundle.spec == DiffusionSpec("shifted", "bidirectional", None, 95, 1, 2, "diffullama")


@pytest.mark.parametrize(("rows", "mask"), [(50257, 10541), (50258, 50257)])
def test_the_mask_of_diffugpt_follows_from_its_embedding_rows(rows, mask, edited):
    def grow(tensors: dict, config: dict) -> None:
        to_diffugpt(tensors, config)
        del config["mask_token_id"]
        config["vocab_size"] = 50257
        tensors["embed_tokens.weight"] = np.zeros((rows, 32), np.float32)

    bundle = read_hf(edited("gpt2", grow))
    assert (bundle.spec.mask_token_id, bundle.config.vocab_size) == (mask, rows)


def test_a_diffusion_checkpoint_without_a_mask_asks_for_one(edited):
    def forget(tensors: dict, config: dict) -> None:
        to_diffugpt(tensors, config)
        del config["mask_token_id"]

    directory = edited("gpt2", forget)
    with pytest.raises(UserError, match="set mask_token_id"):
        read_hf(directory)
    assert read_hf(directory, spec_changes={"mask_token_id": 94}).spec.mask_token_id == 94


def test_dream_is_a_bidirectional_qwen2(tiny, edited, same):
    def dream(tensors: dict, config: dict) -> None:
        config |= {"model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": 95}

    bundle, base = read_hf(edited("qwen2", dream)), read_hf(tiny("qwen2").directory)
    assert same(bundle.params, base.params) and bundle.config == base.config
    assert bundle.spec == DiffusionSpec("shifted", "bidirectional", None, 95, 1, 2)


def test_a_successor_of_dream_that_decodes_in_blocks_is_refused(edited):
    def reasoner(tensors: dict, config: dict) -> None:
        config |= {"model_type": "Dream", "mask_token_id": 95, "block_size": 32}

    with pytest.raises(UserError, match="block_size: 32"):
        read_hf(edited("qwen2", reasoner))


@pytest.mark.parametrize("names", [(), (("model.", "encoder."), ("lm_head.", "diffusion_head."))])
def test_efficient_dlm_is_a_block_causal_qwen3(names, tiny, edited, same):
    def efficient(tensors: dict, config: dict) -> None:
        rename(tensors, *names)
        config |= {"architectures": ["EfficientDLM"], "block_size": 32, "dlm_paradigm": "bidirectional",
                   "dlm_type": "llada", "mask_token_id": 95}

    bundle, base = read_hf(edited("qwen3", efficient)), read_hf(tiny("qwen3").directory)
    assert same(bundle.params, base.params) and bundle.config == base.config
    assert bundle.spec == DiffusionSpec("same_position", "block_causal", 32, 95, 1, 2, "efficient_dlm")


LLADA_NAMES = (
    ("model.layers.", "model.transformer.blocks."), ("self_attn.o_proj", "attn_out"), ("self_attn.", ""),
    ("mlp.gate_proj", "ff_proj"), ("mlp.up_proj", "up_proj"), ("mlp.down_proj", "ff_out"),
    ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ff_norm"), ("model.norm", "model.transformer.ln_f"),
    ("model.embed_tokens", "model.transformer.wte"), ("lm_head", "model.transformer.ff_out"))
LLADA_CONFIG = {
    "model_type": "llada", "architectures": ["LLaDAModelLM"], "d_model": 32, "n_layers": 3, "n_heads": 4,
    "n_kv_heads": 2, "mlp_hidden_size": 40, "vocab_size": 90, "embedding_size": 96, "max_sequence_length": 64,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope": True, "alibi": False, "block_type": "llama",
    "block_group_size": 1, "layer_norm_type": "rms", "activation_type": "silu", "include_bias": False,
    "include_qkv_bias": False, "weight_tying": False, "scale_logits": False, "mask_token_id": 95, "eos_token_id": 2}


def to_llada(tensors: dict, config: dict) -> None:
    rename(tensors, *LLADA_NAMES)
    config.clear()
    config |= LLADA_CONFIG


def test_llada_is_a_bidirectional_llama(tiny, edited, same):
    bundle, base = read_hf(edited("llama", to_llada)), read_hf(tiny("llama").directory)
    assert same(bundle.params, base.params) and bundle.config == base.config
    assert bundle.spec == DiffusionSpec("same_position", "bidirectional", None, 95, 1, 2)


@pytest.mark.parametrize(("field", "value"), [
    ("block_type", "sequential"), ("alibi", True), ("layer_norm_type", "default"), ("activation_type", "swiglu"),
    ("rope", False), ("include_bias", True), ("scale_logits", True), ("attention_layer_norm", True)])
def test_an_unsupported_variant_of_llada_is_refused(field, value, edited):
    directory = edited("llama", to_llada)
    (directory / "config.json").write_text(json.dumps(LLADA_CONFIG | {field: value}))
    with pytest.raises(UserError, match=f"{field}: {value!r}"):
        read_hf(directory)


def test_missing_tensors_are_called_by_their_names_in_the_checkpoint(edited):
    def lose(tensors: dict, config: dict) -> None:
        to_llada(tensors, config)
        del tensors["model.transformer.blocks.1.ff_proj.weight"]

    with pytest.raises(UserError, match=r"lacks the tensors model\.transformer\.blocks\.1\.ff_proj\.weight;"):
        read_hf(edited("llama", lose))


def test_the_spec_of_an_export_is_what_its_config_states(tmp_path):
    spec = DiffusionSpec("same_position", "block_causal", 16, 7, 1, 2, "efficient_dlm", "org/base", "abc")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "dlm", "base_model_type": "llama", **dataclasses.asdict(spec)}))
    source = recognize(read_json(path), {})
    assert source.spec == dataclasses.asdict(spec) and source.fields["model_type"] == "llama"
