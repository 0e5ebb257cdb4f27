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
            made[spec, name] = transformers.AutoModel.from_pretrained(out, trust_remote_code=True)
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
@pytest.mark.parametrize("threshold", [None, 0.02, 0.0])
def test_greedy_text_equals_that_of_the_jax_sampler(name, spec, threshold, loaded, tiny, prompt):
    model = loaded(spec, name)
    bundle = dataclasses.replace(read_hf(tiny(name).directory), spec=SPECS[spec])
    unmasking = "confidence" if threshold is None else f"threshold:{threshold}"
    ours = LanguageModel(bundle.config, bundle.params, bundle.spec, None)
    requests = [ours_continuation([BOS, *row], 11) for row in prompt.tolist()]
    expected = [sample.tokens[1:] for sample in ours.fill(requests, Settings(unmasking=unmasking))]
    for row, tokens in zip(prompt, expected, strict=True):
        assert model.generate(row[None], 11, threshold=threshold)[0].tolist() == tokens


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
    monkeypatch.setattr(model.config, "eos_token_id", first)
    out = model.generate(prompt, 12)
    for row, full in zip(out.tolist(), plain.tolist(), strict=True):
        end = full.index(first, 6) if first in full[6:] else len(full)
        expected = (full[:end] + [first] * len(full))[:out.shape[1]]
        assert row == expected


def test_right_padding_is_not_attended_to(loaded, prompt):
    model = loaded("same_bidirectional")
    padded = torch.cat([prompt, prompt[:, :3]], 1)
    seen = torch.tensor([[1] * 6 + [0] * 3] * 2)
    out = model(padded, attention_mask=seen).logits[:, :6]
    assert torch.allclose(out, model(prompt).logits, atol=1e-5)
    with pytest.raises(ValueError, match="padding must be on the right"):
        model(padded, attention_mask=seen.flip(1))


@pytest.mark.parametrize(("arguments", "culprit"), [
    ({"max_new_tokens": 0}, "max_new_tokens"), ({"max_new_tokens": 100}, "107 tokens"), ({"steps": 0}, "steps"),
    ({"threshold": 1.5}, "threshold"),
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
