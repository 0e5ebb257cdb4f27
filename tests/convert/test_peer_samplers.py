"""The samplers of LLaDA, Fast-dLLM, dLLM and SDAR run on an export and give the tokens of ours for equal settings."""

import dataclasses
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.sampling.requests import continuation
from dlm_jax.sampling.settings import Settings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peer_samplers = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("peer_samplers.py"))))
MASK, BOS, EOS = 95, 1, 2
FAMILIES = ("gpt2", "qwen3")


@pytest.fixture(scope="module")
def pair(tiny, tmp_path_factory) -> Any:
    """A tiny model whose outputs never propose its mask token, as an export in PyTorch and in JAX."""
    made: dict[tuple, Any] = {}

    def make(family: str, rule: str, alignment: str = "same_position") -> tuple[Any, LanguageModel]:
        key = family, rule, alignment
        if key not in made:
            spec = DiffusionSpec(alignment, rule, 4 if rule == "block_causal" else None, MASK, BOS, EOS)
            bundle = dataclasses.replace(read_hf(tiny(family).directory), spec=spec)
            out = tmp_path_factory.mktemp("_".join(key))
            write_hf(out, bundle)
            model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
            peer_samplers.forbid(model, MASK)
            made[key] = model, LanguageModel(bundle.config, bundle.params, spec, None)
        return made[key]

    return make


@pytest.fixture
def prompt(tokens) -> Any:
    return torch.tensor([[BOS, *tokens[0, :5]]])


def in_jax(lm: LanguageModel, prompt: Any, new: int, **settings: Any) -> list[int]:
    request = dataclasses.replace(continuation(prompt[0].tolist(), new), stop=False)
    [sample] = lm.fill([request], Settings(**settings))
    return sample.tokens


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("block,steps", [(24, 24), (24, 6), (24, 7), (8, 24), (8, 9)])
def test_lladas_and_fast_dllms_samplers_give_the_tokens_of_generate_and_of_jax(family, block, steps, pair, prompt):
    model, lm = pair(family, "bidirectional")
    expected = model.generate(prompt, 24, steps=steps, block_length=block, stop_at_eos=False)
    assert in_jax(lm, prompt, 24, steps=steps, block=block) == expected[0].tolist()
    for sampler in (peer_samplers.llada, peer_samplers.fast_dllm):
        assert torch.equal(sampler(model, prompt, steps, 24, block, MASK), expected), sampler.__name__


@pytest.mark.parametrize("family", FAMILIES)
def test_lladas_guidance_and_padding_give_the_tokens_of_jax(family, pair, prompt):
    model, lm = pair(family, "bidirectional")
    guided = peer_samplers.llada(model, prompt, 6, 24, 8, MASK, cfg_scale=1.5)
    assert guided[0].tolist() == in_jax(lm, prompt, 24, steps=6, block=8, cfg_scale=1.5)
    padded, seen = torch.nn.functional.pad(prompt, (3, 0), value=EOS), torch.tensor([[0] * 3 + [1] * 6])
    alone = peer_samplers.llada(model, prompt, 6, 24, 8, MASK)
    assert torch.equal(peer_samplers.llada(model, padded, 6, 24, 8, MASK, attention_mask=seen)[:, 3:], alone)


@pytest.mark.parametrize("family", FAMILIES)
def test_fast_dllms_prefix_cache_gives_the_tokens_of_the_prefix_cache_in_jax(family, pair, prompt):
    model, lm = pair(family, "bidirectional")
    out = peer_samplers.fast_dllm(model, prompt, 12, 24, 8, MASK, prefix_cache=True)
    assert out[0].tolist() == in_jax(lm, prompt, 24, steps=12, block=8, cache="prefix")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("alignment", ["shifted", "same_position"])
def test_dllms_sampler_gives_each_prompt_of_a_batch_the_tokens_of_generate_and_of_jax(family, alignment, pair, prompt):
    model, lm = pair(family, "bidirectional", alignment)
    prompts = [prompt[0], prompt[0, :4]]
    out = peer_samplers.dllm(model, prompts, 9, 24, 8, MASK, EOS, right_shift_logits=alignment == "shifted")
    for row, text in zip(out, prompts, strict=True):
        expected = model.generate(text[None], 24, steps=9, block_length=8, stop_at_eos=False)[0]
        assert torch.equal(row[:len(expected)], expected)
        assert in_jax(lm, text[None], 24, steps=9, block=8) == expected.tolist()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("length,steps", [(1, 4), (4, 4), (5, 4), (4, 2)])
def test_sdars_sampler_gives_the_tokens_of_generate_and_of_jax(family, length, steps, pair, prompt):
    """Its steps are those of a block, also of one that a prompt began, so there equality needs one token a step."""
    model, lm = pair(family, "block_causal")
    prompt, new = prompt[:, :length], 16 - length
    expected = model.generate(prompt, new, steps=new * steps // 4, stop_at_eos=False)
    out = peer_samplers.sdar(model, prompt, new, 4, steps, MASK, transformers.DynamicCache())
    assert torch.equal(out, expected)
    assert in_jax(lm, prompt, new, steps=new * steps // 4) == expected[0].tolist()
