"""Exports in the layout of a published model, under its authors' own classes.

Their files are not ours to copy. DLM_AUTHORS names a folder that holds them: `llada/` with `modeling_llada.py` and
`configuration_llada.py` (from Fast-dLLM or the hub), `fast_dllm_v2/` with `modeling.py` and `configuration.py`, and
`site/` with the release of transformers that they were written for (`pip install --target site transformers==4.53.3`).
SDAR's file needs flash-attn, which needs a GPU; Stable-DiffCoder's is transformers' own LLaMA with a sampler.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from dlm_jax.convert.hf_export import write_hf
from dlm_jax.language_model import LanguageModel
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.diffusion_spec import DiffusionSpec

torch = pytest.importorskip("torch", reason="needs PyTorch")
AUTHORS = os.environ.get("DLM_AUTHORS", "")
BLOCKS = {"rule": "block_causal", "block_size": 4}
TOKENS = np.random.default_rng(0).integers(0, 30, (2, 12))


def exported(random_model, directory, family, alignment, layout, fields, **changes):
    """A random model in a layout, and its logits."""
    config, params = random_model(family, head_dim=4, **changes)
    spec = DiffusionSpec(alignment, mask_token_id=30, bos_token_id=1, eos_token_id=2, **fields)
    model = Bundle(config, jax.tree.map(np.asarray, params), spec)
    write_hf(directory, model, layout=layout)
    return np.asarray(LanguageModel(config, params, spec, None).logits(TOKENS))


@pytest.mark.parametrize("layout,family,alignment,fields", (
    ("llada", "llama", "same_position", {"rule": "bidirectional"}), ("fast_dllm_v2", "qwen2", "shifted", BLOCKS)))
def test_the_authors_class_computes_our_logits(random_model, tmp_path, layout, family, alignment, fields):
    if not (Path(AUTHORS) / layout).is_dir() or not AUTHORS:
        pytest.skip("needs the authors' files: DLM_AUTHORS names their folder")
    ours = exported(random_model, tmp_path, family, alignment, layout, fields)
    command = [sys.executable, str(Path(__file__).with_name("run_authors.py")), layout, AUTHORS, str(tmp_path),
               json.dumps(TOKENS.tolist()), "4"]
    run = subprocess.run(command, capture_output=True, text=True, check=False,
                         env=os.environ | {"PYTHONPATH": str(Path(AUTHORS) / "site")})
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(json.loads(run.stdout), ours, atol=1e-4)


@pytest.mark.parametrize("layout,family,alignment,name", (
    ("sdar", "qwen3", "same_position", "Qwen3"), ("fast_dllm_v2", "qwen2", "shifted", "Qwen2"),
    ("stable_diffcoder", "llama", "same_position", "Llama")))
def test_the_family_of_a_layout_with_a_mask_of_blocks_computes_our_logits(random_model, tmp_path, layout, family,
                                                                          alignment, name):
    """As the engines do, which load the family's tensors and bring their own mask."""
    import transformers
    ours = exported(random_model, tmp_path, family, alignment, layout, BLOCKS)
    fields = {k: v for k, v in json.loads((tmp_path / "config.json").read_text()).items()
              if k not in ("auto_map", "architectures", "model_type")}
    config = getattr(transformers, f"{name}Config")(**fields)
    model = getattr(transformers, f"{name}ForCausalLM").from_pretrained(tmp_path, config=config).eval()
    block = torch.arange(TOKENS.shape[1]) // 4
    mask = torch.where(block[:, None] >= block, 0.0, -torch.inf)[None, None].expand(len(TOKENS), -1, -1, -1)
    with torch.no_grad():
        found = model(torch.tensor(TOKENS), attention_mask=mask).logits.numpy()
    np.testing.assert_allclose(found, ours, atol=1e-4)
