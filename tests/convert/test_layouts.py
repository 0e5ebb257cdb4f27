"""Engines' layouts: what is written reads back bit for bit and computes the same in PyTorch, and what a layout cannot
express is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dlm_jax.commands.main import main
from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.convert.layouts import FIXED_MASK, LAYOUTS, engines, fitting
from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import flatten

BLOCKS = {"rule": "block_causal", "block_size": 4}
FITS = {"sdar": ("qwen3", "same_position", BLOCKS), "fast_dllm_v2": ("qwen2", "shifted", BLOCKS),
        "stable_diffcoder": ("llama", "same_position", BLOCKS),
        "llada": ("llama", "same_position", {"rule": "bidirectional"}),
        "ar": ("qwen3", "shifted", BLOCKS | {"clean_half": "token_causal"})}


@pytest.fixture
def bundle(random_model):
    def make(family, alignment, fields):
        config, params = random_model(family, head_dim=4)
        spec = DiffusionSpec(alignment, mask_token_id=30, bos_token_id=1, eos_token_id=2, recipe="mine", **fields)
        return Bundle(config, jax.tree.map(np.asarray, params), spec)

    return make


@pytest.mark.parametrize("layout", FITS)
def test_what_is_written_reads_back_bit_for_bit(bundle, tmp_path, layout):
    model = bundle(*FITS[layout])
    write_hf(tmp_path, model, layout=layout)
    back = read_hf(tmp_path)
    expected = model.spec if layout != "ar" else dataclasses.replace(
        model.spec, rule="causal", block_size=None, clean_half="block_causal")
    assert back.config == model.config and back.spec == dataclasses.replace(expected, recipe=back.spec.recipe)
    assert back.spec.recipe in ("mine", "fast_dllm_v2")
    ours, theirs = flatten(model.params), flatten(back.params)
    assert all(np.array_equal(ours[path], theirs[path]) for path in ours)


@pytest.mark.parametrize("layout", [name for name in FITS if LAYOUTS[name].own_code])
def test_pytorch_computes_what_we_do(bundle, tmp_path, layout):
    torch = pytest.importorskip("torch", reason="needs PyTorch")
    from transformers import AutoModelForCausalLM

    from dlm_jax.language_model import LanguageModel
    model = bundle(*FITS[layout])
    write_hf(tmp_path, model, layout=layout)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=layout != "ar").eval()
    tokens = np.arange(3, 15)[None] % 30
    lm = LanguageModel(model.config, model.params, model.spec, None)
    expected = lm.logits(tokens, rule="causal" if layout == "ar" else None)
    with torch.no_grad():
        found = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_the_fields_that_old_engines_read_are_there(bundle, tmp_path):
    write_hf(tmp_path, bundle(*FITS["sdar"]), layout="sdar")
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["model_type"] == "sdar" and fields["architectures"] == ["SDARForCausalLM"]
    assert fields["rope_theta"] == fields["rope_parameters"]["rope_theta"] and fields["sliding_window"] is None
    assert fields["block_size"] == 4 and fields["mask_token_id"] == 30 and fields["attention_bias"] is False
    assert "block_size: 4" in (tmp_path / "dllm_config.yaml").read_text()
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "## Engines that read it" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name not in ("dlm", "ar")])
@pytest.mark.parametrize("other", FITS)
def test_a_model_that_a_layout_cannot_express_is_refused_with_those_that_can(bundle, tmp_path, layout, other):
    model = bundle(*FITS[other])
    if layout == other:
        assert fitting(model)[0] == layout
        return
    with pytest.raises(UserError, match=f"the layout {layout} cannot express this model: .*; choose {other}"):
        write_hf(tmp_path, model, layout=layout)
    assert not list(tmp_path.iterdir())


def test_engines_that_know_one_mask_id_only_are_named_for_that_one(bundle):
    model = bundle(*FITS["sdar"])
    assert "SGLang" not in engines(model, "sdar") and "JetEngine" in engines(model, "sdar")
    fixed = dataclasses.replace(model, spec=dataclasses.replace(model.spec, mask_token_id=FIXED_MASK))
    assert "SGLang" in engines(fixed, "sdar") and "LMDeploy" in engines(fixed, "sdar")


def test_the_command_says_which_engines_read_the_model(bundle, tmp_path, capsys):
    from dlm_jax.convert.native import write_native
    (tmp_path / "model").mkdir()
    write_native(tmp_path / "model", bundle(*FITS["fast_dllm_v2"]))
    command = ["export", str(tmp_path / "model"), "--layout"]
    assert main([*command, "auto", "--out", str(tmp_path / "a"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["layout"] == "fast_dllm_v2" and found["engines"] == "Diffulex"
    assert main([*command, "sdar", "--out", str(tmp_path / "b")]) == 2
    assert "choose fast_dllm_v2, dlm" in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert main([*command, "nosuch", "--out", str(tmp_path / "b")]) == 2
    assert "'nosuch' is not a layout" in capsys.readouterr().err
