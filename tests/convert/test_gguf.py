"""GGUF files: the weights and fields that llama.cpp reads, and what it does not know is refused."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from dlm_jax.commands.main import main
from dlm_jax.convert.gguf_export import FILE, gguf_name, interleaved, kind_of
from dlm_jax.data.tokenizer import Tokenizer
from dlm_jax.errors import UserError
from dlm_jax.language_model import LanguageModel, load
from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import init

gguf = pytest.importorskip("gguf", reason="needs gguf: pip install 'dlm-jax[gguf]'")
CONFIG = ModelConfig("llama", vocab_size=300, width=32, depth=2, heads=2, kv_heads=1, head_dim=16, mlp_width=64,
                     max_length=64, rope=Rope(), norm="rms", norm_eps=1e-5, mlp="swiglu")
SPEC = DiffusionSpec("shifted", "bidirectional", None, 299, bos_token_id=0, eos_token_id=1)


@pytest.fixture
def model(base):
    """A random model of the given shape and spec, with the tokenizer of `base`."""
    def make(spec=SPEC, **changes):
        config = dataclasses.replace(CONFIG, **changes)
        return LanguageModel(config, init(config, jax.random.key(0)), spec, Tokenizer.load(base))

    return make


def read(directory):
    """Fields and tensors of the file; the shapes as numpy has them."""
    reader = gguf.GGUFReader(directory / FILE)
    tensors = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return {name: field.contents() for name, field in reader.fields.items()}, tensors


@pytest.mark.parametrize("alignment,text", (("shifted", "true"), ("same_position", "false")))
def test_a_diffusion_model_says_how_it_denoises(model, tmp_path, alignment, text):
    model(dataclasses.replace(SPEC, alignment=alignment)).export(tmp_path / "out", "float32", "gguf")
    fields, tensors = read(tmp_path / "out")
    assert fields["general.architecture"] == "dream" and fields["dream.attention.causal"] is False
    assert fields["diffusion.shift_logits"] == text and fields["tokenizer.ggml.mask_token_id"] == 299
    assert (fields["dream.attention.head_count"], fields["dream.attention.head_count_kv"]) == (2, 1)
    assert {name for name in tensors if not name.startswith("blk.")} == {"token_embd.weight", "output_norm.weight"}
    assert len([name for name in tensors if name.startswith("blk.1.")]) == 9


@pytest.mark.parametrize("family", ("llama", "qwen2"))
@pytest.mark.parametrize("spec", (SPEC, DiffusionSpec(bos_token_id=0, eos_token_id=1)))
def test_the_weights_are_those_of_the_hugging_face_export(model, tmp_path, family, spec):
    from safetensors.numpy import load_file
    lm = model(spec, family=family, qkv_bias=family == "qwen2")
    lm.export(tmp_path / "out", "float32", "gguf")
    lm.export(tmp_path / "hf", "float32")
    fields, tensors = read(tmp_path / "out")
    expected = load_file(tmp_path / "hf" / "model.safetensors")
    assert fields["general.architecture"] == ("dream" if spec.is_diffusion else family)
    assert tensors.keys() == {gguf_name(name) for name in expected}
    for name, array in expected.items():
        if fields["general.architecture"] == "llama" and ("q_proj" in name or "k_proj" in name):
            array = interleaved(array, lm.config)
        np.testing.assert_array_equal(tensors[gguf_name(name)], array)


def test_rows_that_are_rotated_together_stand_side_by_side():
    rows = np.arange(32).reshape(32, 1)  # two heads of 16
    np.testing.assert_array_equal(interleaved(rows, CONFIG)[:, 0], [
        head * 16 + half * 8 + i for head in range(2) for i in range(8) for half in range(2)])


@pytest.mark.parametrize("dtype,error", (("float16", 1e-3), ("q8_0", 1e-2)))
def test_fewer_bits_are_close(model, tmp_path, dtype, error):
    model().export(tmp_path / "out", dtype, "gguf")
    model().export(tmp_path / "exact", "float32", "gguf")
    found, expected = read(tmp_path / "out")[1], read(tmp_path / "exact")[1]
    for name, array in expected.items():
        assert np.abs(found[name] - array).max() <= error * np.abs(array).max()
    assert (tmp_path / "out" / FILE).stat().st_size < (tmp_path / "exact" / FILE).stat().st_size


def test_the_tokenizer_travels_with_its_merges_and_kinds_of_tokens(tmp_path, shared):
    stories = load(shared / "stories260k").with_mask()
    dataclasses.replace(stories, spec=dataclasses.replace(stories.spec, rule="bidirectional")).export(
        tmp_path / "out", None, "gguf")
    fields, _ = read(tmp_path / "out")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    assert (fields["tokenizer.ggml.model"], len(tokens)) == ("llama", 513)
    assert [types[i] for i in (0, 1, 2, 3, 300, 512)] == [2, 3, 3, 6, 1, 3]  # unknown, control, byte, normal, control
    scores = fields["tokenizer.ggml.scores"]
    merges = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["merges"]
    joined = ["".join(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    assert [scores[tokens.index(token)] for token in joined] == [-float(joined.index(token)) for token in joined]


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused():
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    assert kind_of({"model": {"type": "BPE"}, "pre_tokenizer": level}) == "gpt-2"
    assert kind_of({"model": {"type": "BPE"}, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, level]}}
                   ) == "smollm"
    for fields in ({}, {"model": {"type": "Unigram"}}, {"model": {"type": "BPE"}, "pre_tokenizer": digits}):
        with pytest.raises(UserError, match="cuts texts"):
            kind_of(fields)


@pytest.mark.parametrize("spec,changes,said", (
    (dataclasses.replace(SPEC, rule="block_causal", block_size=4), {}, "no block diffusion"),
    (SPEC, {"family": "qwen3", "qk_norm": True}, "llama and qwen2"),
    (SPEC, {"rope": Rope(scaling="linear", factor=2.0)}, "scaling of rope"),
    (SPEC, {"heads": 4, "kv_heads": 2}, "together have the model's width")))
def test_a_model_that_llama_cpp_cannot_run_is_refused(model, tmp_path, spec, changes, said):
    with pytest.raises(UserError, match=said):
        model(spec, **changes).export(tmp_path / "out", None, "gguf")
    assert not (tmp_path / "out").exists()


def test_a_dtype_of_another_layout_is_refused(base, tmp_path, capsys):
    assert main(["export", str(base), "--out", str(tmp_path / "out"), "--dtype", "q8_0"]) == 2
    assert "float32 or bfloat16" in capsys.readouterr().err
    assert main(["export", str(base), "--out", str(tmp_path / "out"), "--layout", "gguf", "--dtype", "bfloat16"]) == 2
    assert "choose one of float32, float16, q8_0" in capsys.readouterr().err
