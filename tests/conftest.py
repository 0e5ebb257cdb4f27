"""What all tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.weights import Params, map_table


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the repository; a test that needs it is skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data of {folder}")
    return folder


FAMILIES = {
    "gpt2": {"rope": None, "norm": "layer", "mlp": "gelu", "qkv_bias": True, "output_bias": True, "mlp_bias": True,
             "kv_heads": 4},
    "llama": {"tied_head": False},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


@pytest.fixture(scope="session")
def random_model() -> Callable[..., tuple[ModelConfig, Params]]:
    """Makes (config, parameters) of a tiny model of a family; fields of the config can be changed.

    Nothing in the parameters is left at zero or one, so that a place that is read wrongly shows.
    """
    def make(family: str = "qwen2", seed: int = 0, **changes: Any) -> tuple[ModelConfig, Params]:
        fields = {"vocab_size": 31, "width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_width": 20,
                  "max_length": 64, "rope": Rope(), "norm": "rms", "norm_eps": 1e-5, "mlp": "swiglu"}
        config = ModelConfig(family=family, **fields | FAMILIES[family] | changes)
        random = np.random.default_rng(seed)
        return config, map_table(config, lambda _, w: np.float32(w.constant) + random.normal(
            0, 0.3, w.shape).astype(np.float32))

    return make
