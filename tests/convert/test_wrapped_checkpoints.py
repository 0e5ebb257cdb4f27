"""Checkpoints that are a supported family under another `model_type` keep its weights, and state how they denoise."""

import json

import pytest

from dlm_jax.convert.hf_import import read_hf
from dlm_jax.convert.published import recognize
from dlm_jax.convert.wrapped import WRAPPERS
from dlm_jax.errors import UserError
from dlm_jax.models.diffusion_spec import DiffusionSpec

WAYS = {
    "sdar": ({"block_size": 16}, DiffusionSpec("same_position", "block_causal", 16, 95, 1, 2)),
    "Fast_dLLM_Qwen": ({"bd_size": 8}, DiffusionSpec("shifted", "block_causal", 8, 95, 1, 2, "fast_dllm_v2")),
    "a2d-llama": ({}, DiffusionSpec("same_position", "bidirectional", None, 95, 1, 2)),
    "a2d-qwen2": ({}, DiffusionSpec("same_position", "bidirectional", None, 95, 1, 2)),
    "a2d-qwen3": ({"block_size": 32}, DiffusionSpec("same_position", "block_causal", 32, 95, 1, 2)),
}


def wrapped(model_type: str, **stated):
    def edit(tensors: dict, config: dict) -> None:
        config |= {"model_type": model_type, "auto_map": {"AutoModel": "modeling.Theirs"}, **stated}

    return edit


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_a_wrapper_has_its_family_s_weights_and_its_own_way_to_denoise(model_type, tiny, edited, same):
    stated, spec = WAYS[model_type]
    family = WRAPPERS[model_type].family
    bundle = read_hf(edited(family, wrapped(model_type, mask_token_id=95, **stated)))
    base = read_hf(tiny(family).directory)
    assert same(bundle.params, base.params) and bundle.config == base.config
    assert bundle.spec == spec


@pytest.mark.parametrize(("model_type", "block", "mask"), [("sdar", 4, 151669), ("Fast_dLLM_Qwen", 32, 151665)])
def test_what_the_authors_code_takes_for_granted_is_the_default(model_type, block, mask):
    spec = recognize({"model_type": model_type}, {}).spec
    assert (spec["block_size"], spec["mask_token_id"]) == (block, mask)


@pytest.mark.parametrize("stated", ["<|mask|>", {"content": "<|mask|>", "lstrip": False}])
def test_a_mask_token_that_only_the_tokenizer_names_is_found_there(stated, edited):
    directory = edited("llama", wrapped("a2d-llama"))
    with pytest.raises(UserError, match="does not state its mask token"):
        read_hf(directory)
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": stated}))
    (directory / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"id": 94, "content": "<|mask|>"}]}))
    assert read_hf(directory).spec.mask_token_id == 94


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3"])
def test_a_family_under_an_unknown_model_type_is_refused_with_what_it_must_state(family, tiny, edited, same):
    directory = edited(family, wrapped("bd3lm-of-mine"))
    with pytest.raises(UserError, match=f"'bd3lm-of-mine' is not supported, but .* of {family}; .* base_model_type"):
        read_hf(directory)
    config = json.loads((directory / "config.json").read_text()) | {
        "model_type": "dlm", "base_model_type": family, "alignment": "same_position", "rule": "block_causal",
        "mask_token_id": 95, "block_size": 4}
    (directory / "config.json").write_text(json.dumps(config))
    bundle = read_hf(directory)
    assert same(bundle.params, read_hf(tiny(family).directory).params)
    assert (bundle.spec.rule, bundle.spec.block_size) == ("block_causal", 4)
