"""Tiny random checkpoints made by transformers' own classes, and logits from both implementations."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from dlm_jax.attention.rules import Rule
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.transformer import forward, unembed
from dlm_jax.models.weights import flatten

LLAMA = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
LLAMA3_ROPE = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"vocab_size": 96, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64,
                                 "bos_token_id": 1, "eos_token_id": 2}),
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama3": ("LlamaForCausalLM", LLAMA | {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "llama_linear": ("LlamaForCausalLM", LLAMA | {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}, "head_dim": 12}),
    "llama_biased": ("LlamaForCausalLM", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2ForCausalLM", LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", LLAMA | {"head_dim": 16}),
}


class Tiny(NamedTuple):
    """A checkpoint directory, and the transformers model that it was saved from."""

    directory: Path
    model: Any


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny matrices gain nothing from threads, and on a busy machine threads waiting for each other cost seconds."""
    try:
        import torch
    except ImportError:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Makes the named model of `MODELS`, once, with every weight random."""
    torch = pytest.importorskip("torch")
    made: dict[str, Tiny] = {}

    def make(name: str) -> Tiny:
        if name not in made:
            class_name, settings = MODELS[name]
            directory = tmp_path_factory.mktemp(name)
            model = random_model(torch, class_name, settings)
            model.save_pretrained(directory)
            made[name] = Tiny(directory, model)
        return made[name]

    return make


@pytest.fixture
def edited(tiny: Callable[[str], Tiny], tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of a tiny checkpoint that `edit(tensors, config)` has changed in place."""
    def make(name: str, edit: Callable[[dict, dict], Any]) -> Path:
        source, out = tiny(name).directory, tmp_path / "edited"
        tensors, config = load_file(source / "model.safetensors"), json.loads((source / "config.json").read_text())
        edit(tensors, config)
        shutil.copytree(source, out)
        save_file(tensors, out / "model.safetensors")
        (out / "config.json").write_text(json.dumps(config))
        return out

    return make


@pytest.fixture(scope="session")
def same() -> Callable[[dict, dict], bool]:
    """Whether two parameter trees are equal bit for bit."""
    def compare(a: dict, b: dict) -> bool:
        a, b = flatten(a), flatten(b)
        return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)

    return compare


def random_model(torch: Any, class_name: str, settings: dict[str, Any]) -> Any:
    import transformers

    model_class = getattr(transformers, class_name)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**settings)).eval()
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="session")
def tokens() -> np.ndarray:
    """Two rows of 19 tokens of the tiny vocabulary, without its last token, which serves as the mask."""
    return np.random.default_rng(0).integers(3, 95, (2, 19))


@pytest.fixture(scope="session")
def our_logits() -> Callable[[Bundle, np.ndarray, Rule], np.ndarray]:
    def logits(bundle: Bundle, tokens: np.ndarray, rule: Rule) -> np.ndarray:
        hidden = forward(bundle.params, jnp.asarray(tokens), config=bundle.config, rule=rule)
        return np.asarray(unembed(bundle.params, hidden, bundle.config))

    return logits


@pytest.fixture(scope="session")
def their_logits() -> Callable[..., np.ndarray]:
    torch = pytest.importorskip("torch")

    def logits(model: Any, tokens: np.ndarray, **arguments: Any) -> np.ndarray:
        with torch.no_grad():
            return model(torch.tensor(tokens), **arguments).logits.numpy()

    return logits
