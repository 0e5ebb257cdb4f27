"""Prints the logits of an export under the authors' own class: run_authors.py KIND FOLDER EXPORT TOKENS BLOCK.

KIND is `llada` or `fast_dllm_v2`, FOLDER holds the authors' files. A process of its own, since they were written for
another release of transformers.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

CLASSES = {"llada": ("modeling_llada", "configuration_llada", "LLaDAModelLM", "LLaDAConfig"),
           "fast_dllm_v2": ("modeling", "configuration", "Fast_dLLM_QwenForCausalLM", "Fast_dLLM_QwenConfig")}


def main(kind, folder, export, tokens, block):
    """Every tensor of the export must have its place in the class, and the other way around."""
    package = Path(folder) / kind
    sys.path[:0] = [str(package), str(package.parent)]
    modeling, configuration, name, config_name = CLASSES[kind]
    prefix = f"{kind}." if kind == "llada" else ""
    config = getattr(importlib.import_module(prefix + configuration), config_name).from_pretrained(export)
    config.use_cache = False
    model, loading = getattr(importlib.import_module(prefix + modeling), name).from_pretrained(
        export, config=config, output_loading_info=True)
    assert not (loading["missing_keys"] or loading["unexpected_keys"]), loading
    model.eval()
    more = {"block_size": int(block)} if kind == "fast_dllm_v2" else {}
    with torch.no_grad():
        print(json.dumps(model(torch.tensor(json.loads(tokens)), **more).logits.tolist()))


if __name__ == "__main__":
    main(*sys.argv[1:])
