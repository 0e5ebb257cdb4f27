"""Whatever a stranger calls a model, the card shows it as a name: no markup, no new field, no terminal command."""

import pytest
import yaml

from dlm_jax.convert.model_card import adapter_card, model_card
from dlm_jax.convert.origin import Origin
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.lora import Lora

NAMES = ["org/base", "a\nlicense: mit\n---\n# Owned", "<img src=x onerror=alert(1)>", "a | b |\n| c | d", "x` <b> `y",
         "[click](javascript:x)", "\x1b]0;title\x07\x1b[2J", "a: b # c", "'\"\\", "\u202eright to left", "é 日本 🙂",
         "\\|"]


def cards(name: str, random_model) -> list[str]:
    config, params = random_model("llama")
    spec = DiffusionSpec(rule="bidirectional", mask_token_id=3, recipe=name, base_model=name, base_revision=name)
    bundle = Bundle(config, params, spec)
    card = model_card(bundle, scores={name: 0.5}, license=name, datasets=[name])
    return [card, adapter_card(bundle, Lora(rank=2), Origin(name, name, "0" * 64, 30, name))]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_one_yaml_string_and_one_code_span_of_its_cell(name, random_model):
    plain = cards("org/base", random_model)
    for card, expected in zip(cards(name, random_model), plain):
        assert all(char.isprintable() or char == "\n" for char in card)
        _, header, body = card.split("---\n", 2)
        fields, usual = yaml.safe_load(header), yaml.safe_load(expected.split("---\n", 2)[1])
        assert fields.keys() == usual.keys() and isinstance(fields["base_model"], str)
        lines, usual_lines = body.splitlines(), expected.split("---\n", 2)[1:][1].splitlines()
        assert len(lines) == len(usual_lines)
        for line in lines:
            if line.startswith("| ") and "`" in line and "SHA-256" not in line:
                assert line.count("`") == 2 and line.count("|") == 3 and line.endswith(("` |", "` | 0.5 |"))
                line = line.split("`")[0]
            assert "<" not in line or line.startswith("    dlm"), line  # the command is a code block


def test_an_ordinary_name_is_shown_as_it_is(random_model):
    for card in cards("org/base", random_model):
        assert 'base_model: "org/base"' in card and "| base model | `org/base` |" in card


def test_the_card_has_the_hubs_tags_and_the_scores(random_model):
    card, _ = cards("org/base", random_model)
    header = yaml.safe_load(card.split("---\n", 2)[1])
    assert {"diffusion-language-model", "dlm-jax"} <= set(header["tags"])
    assert "| `org/base` | 0.5 |" in card


def test_the_card_states_the_license_and_datasets_that_it_is_given(random_model):
    config, params = random_model("qwen2")
    bundle = Bundle(config, params, DiffusionSpec(base_model="org/base"))
    card = model_card(bundle, license="apache-2.0", datasets=["allenai/c4", "a | b: [c]"])
    header = yaml.safe_load(card.split("---\n", 2)[1])
    assert (header["license"], header["datasets"]) == ("apache-2.0", ["allenai/c4", "a | b: [c]"])
    assert "| license | `apache-2.0` |" in card and "| datasets | `allenai/c4`, `a \N{BROKEN BAR} b: [c]` |" in card


def test_the_card_asks_to_trust_only_the_code_that_we_wrote(random_model):
    card, _ = cards("org/base", random_model)
    assert [line for line in card.splitlines() if "trust_remote_code=True" in line] == [
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)']
