"""The PyTorch sampler that an export carries."""

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from dlm_jax.convert.hf_export import write_hf
from dlm_jax.convert.hf_import import read_hf
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.sampling.requests import continuation as ours_continuation
from dlm_jax.sampling.settings import Settings

torch = pytest.importorskip("torch")
F = pytest.importorskip("torch.nn.functional")
transformers = pytest.importorskip("transformers")
MASK, BOS, EOS = 95, 1, 2
SPECS = {
    "shifted_bidirectional": DiffusionSpec("shifted", "bidirectional", None, MASK, BOS, EOS),
    "shifted_blocks": DiffusionSpec("shifted", "block_causal", 4, MASK, BOS, EOS),
    "same_bidirectional": DiffusionSpec("same_position", "bidirectional", None, MASK, BOS, EOS),
    "same_blocks": DiffusionSpec("same_position", "block_causal", 4, MASK, BOS, EOS),
    "same_token_causal": DiffusionSpec("same_position", "block_causal", 4, MASK, BOS, EOS, clean_half="token_causal"),
}


@pytest.fixture(scope="module")
def loaded(tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Exports a tiny model under the named spec, and loads it in transformers, once."""
    made: dict[tuple, Any] = {}

    def load(spec: str, name: str = "qwen3") -> Any:
        if (spec, name) not in made:
            out = tmp_path_factory.mktemp(f"{name}_{spec}")
            write_hf(out, dataclasses.replace(read_hf(tiny(name).directory), spec=SPECS[spec]))
            made[spec, name] = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        return made[spec, name]

    return load


@pytest.fixture
def prompt(tokens) -> Any:
    return torch.tensor(tokens[:, :6])


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("settings", [{}, {"steps": 3}, {"temperature": 1.0, "top_p": 0.9, "top_k": 20, "seed": 0}])
def test_generation_keeps_the_prompt_and_leaves_no_mask(spec, settings, loaded, prompt):
    out = loaded(spec).generate(prompt, max_new_tokens=11, stop_at_eos=False, **settings)
    assert out.shape == (2, 17) and torch.equal(out[:, :6], prompt) and not (out == MASK).any()


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("settings", [{}, {"steps": 5}, {"threshold": 0.02}, {"threshold": 0.0}])
def test_the_same_call_gives_the_same_text_here_and_in_jax(name, spec, settings, loaded, tiny, prompt):
    model = loaded(spec, name)
    bundle = dataclasses.replace(read_hf(tiny(name).directory), spec=SPECS[spec])
    unmasking = f"threshold:{settings['threshold']}" if "threshold" in settings else "confidence"
    ours = LanguageModel(bundle.config, bundle.params, bundle.spec, None)
    requests = [ours_continuation([BOS, *row], 11) for row in prompt.tolist()]
    expected = [sample.tokens[1:] for sample in ours.fill(requests, Settings(unmasking=unmasking,
                                                                                       steps=settings.get("steps")))]
    for row, tokens in zip(prompt, expected, strict=True):
        assert model.generate(row[None], 11, **settings)[0].tolist() == tokens


@pytest.mark.parametrize("spec", SPECS)
def test_infilling_changes_only_the_masks(spec, loaded, tokens):
    holes = torch.tensor(tokens)
    holes[0, 3:9] = holes[1, 12:] = MASK
    out = loaded(spec, "gpt2").infill(holes, steps=4)
    assert torch.equal(out[holes != MASK], holes[holes != MASK]) and not (out == MASK).any()


@pytest.mark.parametrize("spec", SPECS)
def test_a_single_hole_is_filled_with_the_most_likely_token(spec, loaded, tokens):
    model, holes = loaded(spec), torch.tensor(tokens)
    holes[:, 0], holes[:, 7] = BOS, MASK
    seen = holes[:, :8] if SPECS[spec].clean_half == "token_causal" else holes  # up to the end of the hole's block
    logits = model(seen).logits[:, 7 - (SPECS[spec].alignment == "shifted")].detach()
    logits[:, MASK] = -torch.inf
    assert torch.equal(model.infill(holes)[:, 7], logits.argmax(-1))


@pytest.mark.parametrize("spec", SPECS)
def test_text_follows_its_start_token_as_in_training(spec, loaded, prompt):
    model = loaded(spec)
    started = torch.cat([torch.full((2, 1), BOS), prompt], 1)
    assert torch.equal(model.generate(prompt, 7), model.generate(started, 7)[:, 1:])
    assert torch.equal(model.infill(torch.full((1, 4), MASK)), model.infill(torch.tensor([[BOS] + [MASK] * 4]))[:, 1:])


def test_a_seed_is_reproducible_and_another_differs(loaded, prompt):
    def draw(seed: int) -> Any:
        return loaded("same_blocks").generate(prompt, 12, temperature=1.0, seed=seed, stop_at_eos=False)

    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("spec", ["shifted_bidirectional", "same_blocks"])
def test_a_prompt_may_contain_the_mask_token(spec, loaded, prompt):
    marked = prompt.clone()
    marked[:, 2] = MASK
    assert torch.equal(loaded(spec).generate(marked, 5, stop_at_eos=False)[:, :6], marked)


def test_blocks_do_not_depend_on_how_much_follows(loaded, prompt):
    model = loaded("same_blocks")
    short, long = (model.generate(prompt, n, stop_at_eos=False) for n in (6, 14))
    assert torch.equal(short, long[:, :12])


@pytest.mark.parametrize("spec", ["shifted_bidirectional", "same_blocks"])
def test_generation_stops_once_every_row_has_ended(spec, loaded, prompt, monkeypatch):
    model = loaded(spec)
    plain = model.generate(prompt, 12, stop_at_eos=False)
    first = int(plain[0, 7])
    monkeypatch.setattr(model.generation_config, "eos_token_id", first)
    out = model.generate(prompt, 12)
    for row, full in zip(out.tolist(), plain.tolist(), strict=True):
        end = full.index(first, 6) if first in full[6:] else len(full)
        expected = (full[:end] + [first] * len(full))[:out.shape[1]]
        assert row == expected


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_an_attention_mask_may_have_any_dtype(dtype, name, loaded, prompt):
    model, seen = loaded("same_bidirectional", name), torch.tensor([[0, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]])
    expected, other = (model(prompt, attention_mask=mask).logits for mask in (seen, seen.to(dtype)))
    assert torch.equal(other, expected)
    assert torch.equal(model.generate(prompt, 5, attention_mask=seen.to(dtype)),
                       model.generate(prompt, 5, attention_mask=seen))


def test_right_padding_is_not_attended_to(loaded, prompt):
    model = loaded("same_bidirectional")
    padded = torch.cat([prompt, prompt[:, :3]], 1)
    seen = torch.tensor([[1] * 6 + [0] * 3] * 2)
    out = model(padded, attention_mask=seen).logits[:, :6]
    assert torch.allclose(out, model(prompt).logits, atol=1e-5)
    shifted = model(padded.roll(3, 1), attention_mask=seen.flip(1)).logits[:, 3:]
    assert torch.allclose(shifted, out, atol=1e-5)
    with pytest.raises(ValueError, match="padding must be at the ends of a row"):
        model(padded, attention_mask=torch.tensor([[1, 0, 1] * 3] * 2))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_continued_as_if_it_were_alone(spec, side, loaded, prompt):
    model = loaded(spec)
    short, seen = prompt[1, :4], torch.ones_like(prompt)
    padding = (2, 0) if side == "left" else (0, 2)
    batch = torch.stack([prompt[0], F.pad(short, padding, value=EOS)])
    seen[1] = F.pad(torch.ones_like(short), padding)
    out = model.generate(input_ids=batch, attention_mask=seen, max_new_tokens=9, stop_at_eos=False)
    assert torch.equal(out[:, :6], batch)
    for row, alone in zip(out, (prompt[:1], short[None])):
        assert torch.equal(row[6:], model.generate(alone, 9, stop_at_eos=False)[0, alone.shape[1]:])


@pytest.mark.parametrize("spec", SPECS)
def test_the_loss_is_the_cross_entropy_of_the_labels_by_the_outputs_that_predict_them(spec, loaded, tokens):
    model, ids = loaded(spec), torch.tensor(tokens)
    labels = ids.clone()
    labels[:, ::3] = -100
    out = model(ids, labels=labels)
    log_p = out.logits.log_softmax(-1)
    if SPECS[spec].alignment == "shifted":
        log_p, labels, ids = log_p[:, :-1], labels[:, 1:], ids[:, 1:]
    expected = -log_p.gather(-1, ids[..., None])[..., 0][labels != -100].mean()
    assert torch.allclose(out.loss, expected) and torch.equal(model(ids[:, :5], return_dict=False)[0],
                                                              model(ids[:, :5]).logits)
    with torch.no_grad():
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        assert torch.equal(embedded, model(ids).logits)


def test_fast_dllms_prefix_cache_reuses_keys_and_values_of_another_forward_pass(loaded, tokens):
    """It runs the whole text once, keeps the keys and values before the block, and then runs from the block on."""
    model, ids, start = loaded("same_bidirectional"), torch.tensor(tokens), 8
    full = model(ids, use_cache=True)
    past = tuple(tuple(x[:, :, :start] for x in layer) for layer in full.past_key_values)
    again = model(ids[:, start:], past_key_values=past, use_cache=True)
    assert torch.allclose(again.logits, full.logits[:, start:], atol=1e-5)
    assert again.past_key_values[0][0].shape == full.past_key_values[0][0].shape


def test_the_cache_has_the_name_of_this_transformers_and_the_old_one(loaded, tokens, caplog):
    """`past_key_values` became `cache` in transformers 5.24; a model that speaks of the old name warns there."""
    model, ids = loaded("same_bidirectional"), torch.tensor(tokens)
    past = model(ids[:, :8], use_cache=True)[-1]
    outputs = [model(ids[:, 8:], **{name: past}).logits for name in ("cache", "past_key_values")]
    assert torch.equal(*outputs)
    assert "deprecated" not in caplog.text


def test_sdars_block_loop_fills_a_dynamic_cache_and_reads_it_without_storing(loaded, tokens):
    """It stores finished blocks, and denoises the current one with a mask of its own and `store_kv=False`."""
    model, ids, size = loaded("same_blocks"), torch.tensor(tokens[:, :12]), 4
    expected, cache = model(ids).logits, transformers.DynamicCache()
    for start in range(0, 12, size):
        block = {"input_ids": ids[:, start:start + size], "past_key_values": cache, "use_cache": True,
                 "position_ids": torch.arange(start, start + size)[None],
                 "attention_mask": torch.ones(2, 1, size, start + size, dtype=torch.bool)}
        read = model(**block, store_kv=False)
        assert cache.get_seq_length() == start
        assert torch.allclose(read.logits, expected[:, start:start + size], atol=1e-5)
        model(**block, store_kv=True)
        assert cache.get_seq_length() == start + size


def test_generate_takes_what_transformers_users_pass(loaded, prompt):
    model = loaded("same_blocks")
    assert torch.equal(model.generate(prompt, max_length=13), model.generate(prompt, max_new_tokens=7))
    assert torch.equal(model.generate(prompt, 7, do_sample=False, temperature=0.7), model.generate(prompt, 7))
    given = transformers.GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.5)
    torch.manual_seed(0)
    drawn = model.generate(prompt, generation_config=given)
    torch.manual_seed(0)
    assert torch.equal(drawn, model.generate(prompt, 7, do_sample=True, temperature=0.5))
    assert torch.equal(model.generate(prompt, 7, num_beams=1, use_cache=True, streamer=None), model.generate(prompt, 7))
    assert isinstance(model(prompt, return_dict=None), transformers.modeling_outputs.ModelOutput)


@pytest.mark.parametrize("where", ["argument", "given config", "config of the model"])
def test_settings_that_denoising_lacks_are_refused_by_name_wherever_they_stand(where, loaded, prompt, monkeypatch):
    model, asked = loaded("same_blocks"), {"num_beams": 4, "repetition_penalty": 1.2}
    config = transformers.GenerationConfig(**asked)
    if where == "config of the model":
        monkeypatch.setattr(model, "generation_config", config)
    given = {"argument": asked, "given config": {"generation_config": config}}.get(where, {})
    with pytest.raises(TypeError, match="no num_beams, repetition_penalty; leave that out"):
        model.generate(prompt, 7, **given)
    if where == "config of the model":  # what the caller says comes first
        plain = transformers.GenerationConfig(num_beams=1, repetition_penalty=1.0)
        assert model.generate(prompt, 7, generation_config=plain).shape[0] == 2


def test_a_row_ends_at_the_first_of_several_end_tokens_and_is_padded_with_the_pad_token(loaded, prompt):
    model = loaded("same_blocks")
    plain = model.generate(prompt, 12, stop_at_eos=False)
    ends = [int(plain[0, 13]), int(plain[0, 8])]
    out = model.generate(prompt, 12, eos_token_id=ends, pad_token_id=0)
    for row, full in zip(out.tolist(), plain.tolist(), strict=True):
        end = next((i + 1 for i, token in enumerate(full) if i >= 6 and token in ends), len(full))
        assert row == (full[:end] + [0] * len(full))[:out.shape[1]]


@pytest.mark.parametrize("form", [
    lambda seen: seen[None].float(), lambda seen: seen[None, None], lambda seen: seen[None, None].long(),
    lambda seen: torch.zeros(1, 1, *seen.shape).masked_fill(~seen, -torch.inf)])
def test_a_mask_of_keys_has_one_meaning_in_each_of_its_forms(form, loaded, prompt):
    model, block = loaded("same_blocks"), torch.arange(6) // 4
    assert torch.equal(model(prompt, attention_mask=form(block[:, None] >= block)).logits, model(prompt).logits)
    everything = torch.ones(6, 6, dtype=torch.bool)
    assert torch.equal(model(prompt, attention_mask=form(everything)).logits,
                       model(prompt, rule="bidirectional").logits)
    with pytest.raises(ValueError, match="attention_mask is for 5 tokens; it needs 6"):
        model(prompt, attention_mask=torch.ones(2, 5))


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
@pytest.mark.parametrize("spec", ["shifted_bidirectional", "same_bidirectional"])
@pytest.mark.parametrize("settings", [{}, {"steps": 5}, {"threshold": 0.02}])
def test_blocks_of_a_bidirectional_model_are_those_of_jax_also_a_partial_last_one(name, spec, settings, loaded, tiny,
                                                                                 prompt):
    bundle = dataclasses.replace(read_hf(tiny(name).directory), spec=SPECS[spec])
    unmasking = f"threshold:{settings['threshold']}" if "threshold" in settings else "confidence"
    [sample] = LanguageModel(bundle.config, bundle.params, bundle.spec, None).fill(
        [ours_continuation([BOS, *prompt[0].tolist()], 11)],
        Settings(unmasking=unmasking, steps=settings.get("steps"), block=4))
    assert loaded(spec, name).generate(prompt[:1], 11, block_length=4, **settings)[0].tolist() == sample.tokens[1:]


@pytest.mark.parametrize(("arguments", "culprit"), [
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": 100}, "107 tokens"), ({"steps": 0}, "steps"),
    ({"threshold": 1.5}, "threshold"), ({"block_length": 0}, "block_length"), ({"block_length": 8}, "blocks of 4"),
    ({"temperature": -1.0}, "temperature -1.0"), ({"top_p": 0.0}, "top_p 0.0"), ({"top_k": -1}, "top_k -1")])
def test_misuse_of_generate_is_refused(arguments, culprit, loaded, prompt):
    with pytest.raises(ValueError, match=culprit):
        loaded("shifted_blocks").generate(prompt, **{"max_new_tokens": 4, **arguments})


def test_a_token_that_nothing_predicts_is_refused(loaded, prompt):
    model = loaded("shifted_bidirectional")
    without = copy.deepcopy(model)
    without.config.bos_token_id = without.config.eos_token_id = None
    with pytest.raises(ValueError, match="start token"):
        without.generate(prompt[:, :0], 4)
    with pytest.raises(ValueError, match="first token"):
        without.infill(torch.full((1, 4), MASK))
    with pytest.raises(ValueError, match=r"\[batch, tokens\]"):
        model.generate(prompt[0], 4)
    assert loaded("same_bidirectional").generate(prompt[:, :0], 4, stop_at_eos=False).shape == (2, 4)
    with pytest.raises(ValueError, match="rule 'all'"):
        model(prompt, rule="all")
    with pytest.raises(ValueError, match="needs a block_size"):
        model(prompt, rule="block_causal")
