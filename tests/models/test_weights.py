"""The table of parameters: published counts, initial values, paths."""

import jax
import numpy as np
import pytest

from dlm_jax.models.config import ModelConfig, Rope
from dlm_jax.models.weights import flatten, init, parameter_count, unflatten, weight_table

LLAMA = {"rope": Rope(), "norm": "rms", "norm_eps": 1e-6, "mlp": "swiglu"}
GPT2 = ModelConfig("gpt2", 50257, 768, 12, 12, 12, 64, 3072, 1024, None, "layer", 1e-5, "gelu", qkv_bias=True,
                   output_bias=True, mlp_bias=True)
LLAMA_2_7B = ModelConfig("llama", 32000, 4096, 32, 32, 32, 128, 11008, 4096, **LLAMA, tied_head=False)
QWEN_2_5_HALF_B = ModelConfig("qwen2", 151936, 896, 24, 14, 2, 64, 4864, 32768, **LLAMA, qkv_bias=True)
QWEN_3_0_6B = ModelConfig("qwen3", 151936, 1024, 28, 16, 8, 128, 3072, 40960, **LLAMA, qk_norm=True)


@pytest.mark.parametrize("config, count", [(GPT2, 124_439_808), (LLAMA_2_7B, 6_738_415_616),
                                           (QWEN_2_5_HALF_B, 494_032_768), (QWEN_3_0_6B, 596_049_920)])
def test_parameter_counts_are_the_published_ones(config, count):
    assert parameter_count(config) == count


def test_init_follows_the_table(random_model):
    config, _ = random_model("gpt2", width=64, tied_head=False)
    params = flatten(jax.jit(init, static_argnums=0)(config, jax.random.key(0)))
    table = weight_table(config)
    assert params.keys() == table.keys()
    for path, weight in table.items():
        assert params[path].shape == weight.shape and params[path].dtype == np.float32, path
        if weight.std:
            assert abs(np.std(params[path]) / weight.std - 1) < 5 / np.sqrt(2 * params[path].size), path
        else:
            np.testing.assert_array_equal(params[path], weight.constant, err_msg=path)


def test_only_matrices_decay(random_model):
    for family in ("gpt2", "llama", "qwen2", "qwen3"):
        for path, weight in weight_table(random_model(family)[0]).items():
            assert weight.decays == (path.endswith(".weight") or path.startswith("embed.")), path


def test_unflatten_is_the_inverse_of_flatten(random_model):
    _, params = random_model("gpt2")
    jax.tree.map(np.testing.assert_array_equal, unflatten(flatten(params)), params)


def test_every_axis_of_the_table_has_a_name(random_model):
    for family in ("gpt2", "llama", "qwen2", "qwen3"):
        for weight in weight_table(random_model(family)[0]).values():
            assert len(weight.axes) == len(weight.shape)
