"""Adapters in the format of Hugging Face's PEFT: `adapter_config.json` beside `adapter_model.safetensors`.

Names and shapes follow from the family's table of tensors. PEFT keeps A as [rank, inputs] and B as [outputs, rank], and
one pair for GPT-2's q, k and v together: ours are written as blocks of one of three times the rank.
"""

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy.linalg import block_diag

from dlm_jax.convert.families import PREFIX, Entry, from_hf, hf_shape, tensor_table, to_hf
from dlm_jax.convert.tensors import Outgoing, Stored, read, scan, some, write_file
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora, input_axes
from dlm_jax.models.weights import Params, flatten, unflatten, weight_table

WEIGHTS, DESCRIPTION = "adapter_model.safetensors", "adapter_config.json"
BEFORE = "base_model.model."
# What PEFT can do beyond a plain pair of matrices, and the values that mean it does not.
PLAIN: dict[str, tuple] = {"peft_type": ("LORA",), "bias": ("none",), "use_rslora": (False, None),
                           "use_dora": (False, None), "layers_to_transform": (None,)}


def write_peft(directory: Path, trained: Params, config: ModelConfig, lora: Lora, base: str | None) -> None:
    """Writes what a run with adapters has trained into the existing `directory`; `base` is what they belong to."""
    leaves, weights = flatten(trained), weight_table(config)
    tensors: dict[str, np.ndarray] = {}
    targets, whole = set(), set()
    for entry in tensor_table(config):
        module = entry.name.removesuffix(".weight")
        for i in range(config.depth if entry.stacked else 1):
            pairs = [matrices(leaves, path, i) for path in entry.paths if adapter_of(path) + ".a" in leaves]
            if pairs:
                stem = BEFORE + module.format(i=i)
                tensors[f"{stem}.lora_A.weight"] = np.concatenate([a.T for a, _ in pairs])
                tensors[f"{stem}.lora_B.weight"] = block_diag(*(b.T for _, b in pairs))
                targets.add((module.rpartition(".")[2], len(pairs)))
            elif entry.paths[0] in leaves:
                parts = [np.asarray(leaves[path][i] if entry.stacked else leaves[path]) for path in entry.paths]
                tensors[BEFORE + entry.name.format(i=i)] = to_hf(entry, parts, weights)
                whole.add(module.rpartition(".")[2])
    write_file(directory / WEIGHTS, [Outgoing(name, x.shape, np.dtype(np.float32), functools.partial(
        np.asarray, x, np.float32)) for name, x in tensors.items()])
    fields: dict[str, Any] = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": config.family == "gpt2",
        "target_modules": sorted(name for name, _ in targets), "modules_to_save": sorted(whole) or None,
        "rank_pattern": {name: n * lora.rank for name, n in targets if n > 1},
        "alpha_pattern": {name: n * lora.alpha for name, n in targets if n > 1}}
    (directory / DESCRIPTION).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def adapter_of(path: str) -> str:
    """The stem of the adapter of a weight of ours."""
    return "lora." + path.removesuffix(".weight")


def matrices(leaves: dict[str, Any], path: str, i: int) -> tuple[np.ndarray, np.ndarray]:
    """The adapter of a weight in layer i, as a [inputs, rank] and b [rank, outputs]."""
    a, b = (np.asarray(leaves[f"{adapter_of(path)}.{part}"][i], np.float32) for part in "ab")
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def read_peft(directory: str | Path, config: ModelConfig) -> tuple[Params, Params]:
    """(adapters, weights that replace those of the base) of a PEFT directory; the adapters are to be merged with a
    scale of 1. Raises `UserError` for what is not plain LoRA, and for tensors that this model does not have.

    Names may have another prefix, as DiffuLLaMA's `denoise_model.layers.0...`.
    """
    fields = read_json(Path(directory) / DESCRIPTION)
    for key, plain in PLAIN.items():
        if fields.get(key, plain[0]) not in plain:
            raise UserError(f"{directory} has {key} = {fields[key]!r}, which is not built here; merge it into its base "
                            "with PEFT first")
    stored = scan([Path(directory) / WEIGHTS])
    adapters: dict[str, np.ndarray] = {}
    whole: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for entry in tensor_table(config):
        a, b, own = (of_layers(entry, part, stored, config) for part in (".lora_A.weight", ".lora_B.weight", ".weight"))
        used.update(a, b, own)
        if a:
            pairs = [(read(x, stored[x]), read(y, stored[y])) for x, y in zip(a, b)]
            adapters |= from_pairs(entry, pairs, scale(fields, entry), config)
        if own:
            whole |= whole_weights(entry, own, stored, config)
    if stored.keys() - used:
        raise UserError(f"{directory} has tensors that this model has no place for: {some(stored.keys() - used)}")
    return unflatten(adapters), unflatten(whole)


def of_layers(entry: Entry, part: str, stored: dict[str, Stored], config: ModelConfig) -> list[str]:
    """The stored names of this part of a tensor's module, one a layer; empty where a layer lacks it."""
    tail = entry.name.removeprefix(PREFIX[config.family]).removesuffix(".weight") + part
    ends = [tail.format(i=i) for i in range(config.depth if entry.stacked else 1)]
    found = [next((key for key in stored if key == end or key.endswith("." + end)), None) for end in ends]
    names = [name for name in found if name is not None]
    return names if len(names) == len(ends) else []


def whole_weights(entry: Entry, names: list[str], stored: dict[str, Stored],
                  config: ModelConfig) -> dict[str, np.ndarray]:
    """Our weights, by path, of a tensor that was trained whole. Raises `UserError` for another shape."""
    weights = weight_table(config)
    for name in names:
        if stored[name].shape != hf_shape(entry, weights):
            raise UserError(f"tensor {name} has the shape {list(stored[name].shape)} and this model's has "
                            f"{list(hf_shape(entry, weights))}; give the base its mask token first, with --mask")
    parts = [from_hf(entry, read(name, stored[name]), weights) for name in names]
    return {path: np.stack([part[path] for part in parts]) if entry.stacked else parts[0][path] for path in entry.paths}


def scale(fields: dict[str, Any], entry: Entry) -> float:
    """alpha / r of a module."""
    module = entry.name.removesuffix(".weight").rpartition(".")[2]
    alpha = (fields.get("alpha_pattern") or {}).get(module, fields.get("lora_alpha"))
    rank = (fields.get("rank_pattern") or {}).get(module, fields.get("r"))
    if not alpha or not rank:
        raise UserError(f"{DESCRIPTION} does not say r and lora_alpha; copy the whole adapter")
    return alpha / rank


def from_pairs(entry: Entry, pairs: list[tuple[np.ndarray, np.ndarray]], scale: float,
               config: ModelConfig) -> dict[str, np.ndarray]:
    """Our adapters, by path, of one tensor of all layers; B is shared out where the tensor holds several weights."""
    weights = weight_table(config)
    outputs = [int(np.prod(weights[path].shape[1 + input_axes(weights[path]):])) for path in entry.paths]
    a = np.stack([a.T for a, _ in pairs])
    b = np.split(scale * np.stack([b.T for _, b in pairs]), np.cumsum(outputs)[:-1], axis=-1)
    leaves = {}
    for path, part in zip(entry.paths, b):
        w = weights[path]
        cut = 1 + input_axes(w)
        if (int(np.prod(w.shape[1:cut])), int(np.prod(w.shape[cut:]))) != (a.shape[1], part.shape[2]):
            raise UserError(f"the adapter of {entry.name} has the shapes {list(a.shape[1:])} and "
                            f"{list(part.shape[1:])}, which do not fit this model")
        leaves[f"{adapter_of(path)}.a"] = a.reshape(*w.shape[:cut], -1)
        leaves[f"{adapter_of(path)}.b"] = part.reshape(w.shape[0], -1, *w.shape[cut:])
    return leaves
