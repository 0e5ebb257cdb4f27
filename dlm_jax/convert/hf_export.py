"""Writes bundles as Hugging Face directories that PyTorch users load as usual, and that inference engines read.

The engines' layouts are in `layouts.py`.
"""

import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import numpy as np

from dlm_jax.convert.hf_config import Fields, hf_fields
from dlm_jax.convert.layouts import (
    LAYOUTS,
    autoregressive,
    check_fit,
    default_layout,
    engines,
    layout_fields,
    write_companions,
    write_json,
)
from dlm_jax.convert.model_card import CardOptions, model_card
from dlm_jax.convert.published import RECORDED, renamed
from dlm_jax.convert.tensor_map import Entry, hf_shape, layer_slice, tensor_map, to_hf
from dlm_jax.convert.tensors import Outgoing, checked_dtype, write_sharded
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.weights import flatten, weight_table

CLASSES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM",
           "qwen3": "Qwen3ForCausalLM"}
MODELING = Path(__file__).with_name("modeling_dlm.py")


def write_hf(directory: Path, bundle: Bundle, shard_bytes: int = 5 * 10**9, dtype: str | None = None,
             layout: str | None = None, **card: Unpack[CardOptions]) -> None:
    """Writes `bundle` into the existing `directory`: weights, `config.json`, a model card, and for a diffusion model
    the PyTorch code that loads it. Writing the tokenizer files, before, is up to the caller.

    shard_bytes: the size at which weights are split into several files.
    dtype: `float32` or `bfloat16`, to which weights are rounded as they are written; default: the dtype they are in.
    layout: a name in `LAYOUTS`; default: our own for a diffusion model, the family's for an autoregressive one.
    card: what the model card says beyond what the model itself knows.
    Raises `UserError` for another dtype, and if the family's class or the layout cannot express the model.
    """
    directory, layout = Path(directory), layout or default_layout(bundle)
    check_fit(bundle, layout)
    served = engines(bundle, layout)
    if layout == "ar":
        bundle = autoregressive(bundle)
    tensors = [dataclasses.replace(tensor, name=renamed(tensor.name, LAYOUTS[layout].renames))
               for tensor in outgoing(bundle, dtype)]
    config = config_fields(bundle, tensors[0].dtype)
    if layout not in ("dlm", "ar"):
        config = layout_fields(bundle, layout, config)
        write_companions(directory, bundle, layout)
    files = write_sharded(directory, tensors, "model", shard_bytes)
    if len(set(files.values())) == 1:
        (directory / files[tensors[0].name]).rename(directory / "model.safetensors")
    else:
        total = sum(tensor.nbytes for tensor in tensors)
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": files})
    write_json(directory / "config.json", config)
    (directory / "README.md").write_text(model_card(bundle, served, LAYOUTS[layout].own_code, **card), encoding="utf-8")
    if bundle.spec.is_diffusion and LAYOUTS[layout].own_code:
        shutil.copyfile(MODELING, directory / MODELING.name)


def outgoing(bundle: Bundle, requested: str | None) -> Iterator[Outgoing]:
    """Every Hugging Face tensor. Each is computed from our weights only when it is written."""
    weights, leaves = weight_table(bundle.config), flatten(bundle.params)
    dtype = checked_dtype(requested or leaves["embed.tokens"].dtype)

    def make(entry: Entry, layer: int | None) -> np.ndarray:
        arrays = [np.asarray(layer_slice(leaves[path], layer)) for path in entry.paths]
        return to_hf(entry, arrays, weights).astype(dtype, copy=False)

    for entry in tensor_map(bundle.config):
        for name, layer in entry.tensors(bundle.config):
            yield Outgoing(name, hf_shape(entry, weights), dtype, functools.partial(make, entry, layer))


def config_fields(bundle: Bundle, dtype: np.dtype) -> Fields:
    """The `config.json`: the family's own for an autoregressive model, else `dlm` with the family's fields in it."""
    fields = hf_fields(bundle.config) | {"dtype": dtype.name}
    spec = dataclasses.asdict(bundle.spec)
    if bundle.spec.is_diffusion:
        auto = {"AutoConfig": "modeling_dlm.DLMConfig"}
        auto |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"), "modeling_dlm.DLMModel")
        return fields | spec | {"model_type": "dlm", "base_model_type": bundle.config.family,
                                "architectures": ["DLMModel"], "auto_map": auto}
    recorded = {name: spec[name] for name in ("bos_token_id", "eos_token_id")}
    recorded |= {name: spec[name] for name in RECORDED if spec[name] is not None}
    return fields | recorded | {"architectures": [CLASSES[bundle.config.family]]}
