"""docs/serving.md says of each recipe which layouts express it; so does the code."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from dlm_jax.convert.gguf_export import check_gguf
from dlm_jax.convert.layouts import fitting
from dlm_jax.diffusion.recipes import RECIPES
from dlm_jax.errors import UserError
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.training.run import adapted_spec

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
BODIES = {"LLaMA": "llama", "Qwen2": "qwen2", "Qwen3": "qwen3"}


def table():
    """(recipe, body, layout) of each row, for those that name them."""
    rows = re.findall(r"^\| (`\w.*?) \| (.*?) \| `(\w+)` \|", PAGE.read_text(), re.MULTILINE)
    return {(recipe, BODIES[body], layout) for recipes, bodies, layout in rows
            for recipe in re.findall(r"`(\w+)`", recipes) for body in bodies.split(", ")}


def test_the_table_of_engines_is_what_the_layouts_can_express(random_model):
    found = set()
    for name, recipe in RECIPES.items():
        for family in BODIES.values():
            config, params = random_model(family, head_dim=4)
            spec = adapted_spec(DiffusionSpec(mask_token_id=30 if recipe.masks else None), recipe, "base")
            bundle = Bundle(config, jax.tree.map(np.asarray, params), spec)
            layouts = set(fitting(bundle)) - {"dlm"}
            try:
                check_gguf(bundle)
                layouts.add("gguf")
            except UserError:
                pass
            found |= {(name, family, layout) for layout in layouts}
    assert (table() - found, found - table()) == (set(), set())


def test_the_flags_that_the_page_names_exist():
    from dlm_jax.commands.main import make_parser
    text = PAGE.read_text().split("## Which engine")[0]
    known = make_parser().parse_args(["serve", "bundled"])
    flags = set(re.findall(r"`(--[a-z-]+)", text)) - {"--prompts"}
    assert flags and all(hasattr(known, flag[2:].replace("-", "_")) for flag in flags)


@pytest.mark.parametrize("path", ("/v1/completions", "/v1/chat/completions", "/v1/infill"))
def test_every_field_of_an_endpoint_is_on_the_page(path):
    from dlm_jax.serving.app import ENDPOINTS
    text = PAGE.read_text()
    not_said = {name for name in ENDPOINTS[path].model_fields if f"`{name}`" not in text}
    assert not_said <= {"presence_penalty", "frequency_penalty", "top_logprobs"}


def test_the_example_of_the_page_is_answered(server):
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"none"', '"sesame"').replace('"mine"', '"model"')
    names: dict = {}
    exec(compile(code, "docs/serving.md", "exec"), names)
    assert names["answer"].choices[0].text and names["filled"].usage.completion_tokens == 4
    assert "".join(chunk.choices[0].delta.content or "" for chunk in names["chat"] if chunk.choices)
