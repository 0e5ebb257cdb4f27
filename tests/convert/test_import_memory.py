"""An import needs memory for one copy of the model."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {"model_type": "llama", "vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536,
          "num_hidden_layers": 24, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64,
          "tie_word_embeddings": False}
# The peak of the process itself: `ru_maxrss` would start at the peak of its parent process.
MEASURE = r"""
import re, sys
from pathlib import Path
from dlm_jax.convert.hf_import import read_hf
def peak():
    return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
before = peak()
bundle = read_hf(sys.argv[1])
print(peak() - before)
"""


def write_model(directory: Path) -> int:
    """Writes a model of bfloat16 zeros, and returns its size in bytes."""
    d, f, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    shapes = {"model.embed_tokens.weight": (v, d), "lm_head.weight": (v, d), "model.norm.weight": (d,)}
    for i in range(CONFIG["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (d, d) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (f, d) for p in ("gate", "up")}
        shapes |= {f"{layer}.mlp.down_proj.weight": (d, f), f"{layer}.input_layernorm.weight": (d,),
                   f"{layer}.post_attention_layernorm.weight": (d,)}
    save_file({name: np.zeros(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()},
              directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return sum(2 * int(np.prod(shape)) for shape in shapes.values())


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure a process's peak memory")
def test_an_import_peaks_near_one_copy(tmp_path):
    size = write_model(tmp_path)
    assert size > 150e6
    run = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=True)
    assert size * 0.9 < float(run.stdout) < size * 1.3
