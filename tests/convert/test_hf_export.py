"""An export loads in transformers as the same function, and can be imported again bit for bit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from dlm_jax.attention.rules import Bidirectional, BlockCausal
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec

transformers = pytest.importorskip("transformers")
FAMILIES = ["gpt2", "llama3", "qwen2", "qwen3"]
BIDIRECTIONAL = DiffusionSpec(rule="bidirectional", mask_token_id=95, bos_token_id=1, eos_token_id=2,
                              recipe="diffullama", base_model="org/base", base_revision="0" * 40)
BLOCK_CAUSAL = DiffusionSpec("same_position", "block_causal", 4, 95, 1, None, "efficient_dlm")
AUTOREGRESSIVE = DiffusionSpec(bos_token_id=1, eos_token_id=2, base_model="org/base", mask_token_id=95)


@pytest.fixture
def exported(tiny: Callable, tmp_path: Path) -> Callable:
    """Exports a tiny model under a spec, and returns its bundle and the directory."""
    def make(name: str, spec: DiffusionSpec, **arguments) -> tuple[Bundle, Path]:
        bundle = dataclasses.replace(read_hf(tiny(name).directory), spec=spec)
        out = tmp_path / f"export_{name}_{arguments.get('dtype')}"
        out.mkdir()
        write_hf(out, bundle, **arguments)
        return bundle, out

    return make


@pytest.mark.parametrize("name", [*FAMILIES, "llama_linear", "llama_biased"])
def test_an_autoregressive_export_loads_as_the_ordinary_class(name, tiny, exported, tokens, their_logits):
    _, out = exported(name, AUTOREGRESSIVE)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert type(model) is type(tiny(name).model) and not any(info.values())
    assert np.array_equal(their_logits(model, tokens), their_logits(tiny(name).model, tokens))
    assert not (out / "modeling_dlm.py").exists()


@pytest.mark.parametrize("name", [*FAMILIES, "llama_linear", "llama_biased"])
@pytest.mark.parametrize(("spec", "rule"), [(BIDIRECTIONAL, Bidirectional()), (BLOCK_CAUSAL, BlockCausal(4))])
def test_a_diffusion_export_has_our_logits_in_pytorch(name, spec, rule, exported, tokens, our_logits, their_logits):
    bundle, out = exported(name, spec)
    model, info = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values())
    np.testing.assert_allclose(their_logits(model, tokens), our_logits(bundle, tokens, rule), atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("spec", [AUTOREGRESSIVE, BIDIRECTIONAL, BLOCK_CAUSAL])
def test_export_then_import_gives_equal_bits(name, spec, exported, same):
    bundle, out = exported(name, spec)
    back = read_hf(out)
    assert (back.spec, back.config) == (bundle.spec, bundle.config)
    assert same(back.params, bundle.params)


def test_a_sharded_export_loads_and_can_be_imported_again(exported, tokens, our_logits, their_logits, same):
    bundle, out = exported("llama3", BIDIRECTIONAL, shard_bytes=20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    sizes = [path.stat().st_size for path in out.glob("*.safetensors")]
    assert len(sizes) == len(set(index["weight_map"].values())) > 1
    assert index["metadata"]["total_size"] == sum(leaf.nbytes for leaf in jax.tree.leaves(bundle.params))
    model = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
    np.testing.assert_allclose(their_logits(model, tokens), our_logits(bundle, tokens, Bidirectional()), atol=1e-4)
    assert same(read_hf(out).params, bundle.params)


def test_bfloat16_jax_arrays_are_exported_unchanged(tiny, tmp_path, same):
    bundle = read_hf(tiny("qwen3").directory, dtype="bfloat16")
    bundle = dataclasses.replace(bundle, params=jax.tree.map(jax.numpy.asarray, bundle.params))
    write_hf(tmp_path, bundle)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert same(read_hf(tmp_path).params, bundle.params)


def test_an_export_in_bfloat16_is_rounded_as_pytorch_rounds(exported):
    torch = pytest.importorskip("torch")
    _, fp32 = exported("gpt2", BLOCK_CAUSAL)
    theirs = transformers.AutoModel.from_pretrained(fp32, trust_remote_code=True, dtype=torch.bfloat16).state_dict()
    _, out = exported("gpt2", BLOCK_CAUSAL, dtype="bfloat16")
    ours = transformers.AutoModel.from_pretrained(out, trust_remote_code=True, dtype="auto").state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {x.dtype for x in ours.values()} == {torch.bfloat16}
    with pytest.raises(UserError, match="held in float32 or bfloat16, not in float16"):
        exported("gpt2", BLOCK_CAUSAL, dtype="float16")


def test_saving_the_pytorch_model_keeps_everything(exported, tmp_path):
    bundle, out = exported("gpt2", BLOCK_CAUSAL)
    transformers.AutoModel.from_pretrained(out, trust_remote_code=True).save_pretrained(tmp_path / "saved")
    back = read_hf(tmp_path / "saved")
    assert (back.spec, back.config) == (bundle.spec, bundle.config)


def test_the_model_card_states_what_a_reader_needs(exported):
    _, out = exported("qwen3", BIDIRECTIONAL)
    text = (out / "README.md").read_text()
    for fact in ('base_model: "org/base"', "0" * 40, "diffullama", "95", "shifted", "bidirectional",
                 "trust_remote_code"):
        assert fact in text


def test_the_exported_code_does_not_need_this_library(exported):
    _, out = exported("gpt2", BIDIRECTIONAL)
    assert "import dlm_jax" not in (text := (out / "modeling_dlm.py").read_text()) and "from dlm_jax" not in text


def test_a_model_that_the_family_cannot_express_is_refused(tiny, tmp_path):
    bundle = read_hf(tiny("qwen2").directory)
    bundle = dataclasses.replace(bundle, config=dataclasses.replace(bundle.config, norm="layer"))
    with pytest.raises(UserError, match="qwen2 cannot express"):
        write_hf(tmp_path, bundle)
