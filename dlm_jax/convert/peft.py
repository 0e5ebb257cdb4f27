"""Adapters in the format of Hugging Face's PEFT: `adapter_config.json` and `adapter_model.safetensors`.

Names and shapes follow from the family's tensor table. PEFT stores A as [rank, inputs] and B as [outputs, rank]. It has
a single pair for GPT-2's fused q, k, v, where we have three: those are written as one pair of three times the rank,
with a block-diagonal B.
"""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
from scipy.linalg import block_diag

from dlm_jax.convert import hf_schema
from dlm_jax.convert.hf_config import Fields
from dlm_jax.convert.origin import Origin
from dlm_jax.convert.tensor_map import PREFIX, Entry, from_hf, hf_shape, layer_slice, tensor_map, to_hf
from dlm_jax.convert.tensors import Outgoing, Stored, check_tensor, read, scan, some, write_file
from dlm_jax.errors import UserError
from dlm_jax.files import check_sums, read_json
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.lora import Lora
from dlm_jax.models.weights import Params, flatten, input_axis_count, unflatten, weight_table
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.kinds import check_fields
from dlm_jax.typing import Array, Float, Float32, shape_checked

WEIGHTS, DESCRIPTION = "adapter_model.safetensors", "adapter_config.json"
ORIGIN = "dlm_jax"  # the key of our own in the description; PEFT ignores it
PEFT_PREFIX = "base_model.model."
# PEFT features beyond a plain pair of matrices, each with the values that mean it is off.
PLAIN: dict[str, tuple[object, ...]] = {"peft_type": ("LORA",), "bias": ("none",), "use_rslora": (False, None),
                           "use_dora": (False, None), "layers_to_transform": (None,)}


def write_peft(directory: Path, trained: Params, config: ModelConfig, lora: Lora, base: Origin) -> None:
    """Writes what a LoRA run has trained into the existing `directory`.

    trained: adapters, and the weights that were trained in full. base: the model they belong to.
    """
    leaves = flatten(trained)
    tensors: dict[str, np.ndarray] = {}
    target_modules: dict[str, int] = {}  # by name: how many of our weights each holds
    modules_to_save: set[str] = set()
    for entry in tensor_map(config):
        adapted = [path for path in entry.paths if adapter_stem(path) + ".a" in leaves]
        if adapted:
            target_modules[module_name(entry)] = len(adapted)
            tensors |= pair_tensors(entry, adapted, leaves, config)
        elif entry.paths[0] in leaves:
            modules_to_save.add(module_name(entry))
            tensors |= saved_tensors(entry, leaves, config)
    write_file(directory / WEIGHTS, [Outgoing(name, x.shape, np.dtype(np.float32), functools.partial(
        np.asarray, x, np.float32)) for name, x in tensors.items()])
    fields: Fields = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base.name,
        "revision": base.revision, ORIGIN: dataclasses.asdict(base), "r": lora.rank,
        "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": config.family == "gpt2",
        "target_modules": sorted(target_modules), "modules_to_save": sorted(modules_to_save) or None,
        "rank_pattern": {name: n * lora.rank for name, n in target_modules.items() if n > 1},
        "alpha_pattern": {name: n * lora.alpha for name, n in target_modules.items() if n > 1}}
    (directory / DESCRIPTION).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def pair_tensors(entry: Entry, adapted: list[str], leaves: dict[str, Array],
                 config: ModelConfig) -> dict[str, np.ndarray]:
    """PEFT's A and B for each tensor of `entry`, by stored name, from the adapters of the weights `adapted`."""
    tensors = {}
    for name, layer in entry.tensors(config):
        assert layer is not None, name  # only matrices of layers have adapters
        pairs = [adapter_matrices(leaves, path, layer) for path in adapted]
        stem = PEFT_PREFIX + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = np.concatenate([a.T for a, _ in pairs])
        tensors[f"{stem}.lora_B.weight"] = block_diag(*(b.T for _, b in pairs))
    return tensors


def saved_tensors(entry: Entry, leaves: dict[str, Array], config: ModelConfig) -> dict[str, np.ndarray]:
    """The tensors of `entry`, by stored name, whose weights were trained in full."""
    weights = weight_table(config)
    return {PEFT_PREFIX + name: to_hf(entry, [np.asarray(layer_slice(leaves[path], layer)) for path in entry.paths],
                                      weights)
            for name, layer in entry.tensors(config)}


def module_name(entry: Entry) -> str:
    """The last component of a module's name, such as `q_proj`."""
    return entry.name.removesuffix(".weight").rpartition(".")[2]


def adapter_stem(path: str) -> str:
    """Where the adapter of one of our weights is: its matrices are at this path + '.a' and '.b'."""
    return "lora." + path.removesuffix(".weight")


@shape_checked
def adapter_matrices(leaves: dict[str, Array], path: str,
                     layer: int) -> tuple[Float32[np.ndarray, "inputs rank"], Float32[np.ndarray, "rank outputs"]]:
    """The adapter of a weight in one layer, as a [inputs, rank] and b [rank, outputs], fp32."""
    a, b = (np.asarray(leaves[f"{adapter_stem(path)}.{matrix}"][layer], np.float32) for matrix in "ab")
    return a.reshape(-1, a.shape[-1]), b.reshape(b.shape[0], -1)


def read_peft(directory: str | Path, config: ModelConfig) -> tuple[Params, Params]:
    """Reads a PEFT directory: (adapters, weights that replace those of the base).

    The adapters include their factor alpha / r, so merge them with a scale of 1. Tensor names may have other prefixes
    than PEFT's, such as DiffuLLaMA's `denoise_model.layers.0...`.

    Raises `UserError` for anything but plain LoRA, and for tensors that do not exist in this model.
    """
    check_sums(Path(directory), [DESCRIPTION, WEIGHTS])
    fields = read_json(Path(directory) / DESCRIPTION)
    check_fields(fields, hf_schema.ADAPTER, str(Path(directory) / DESCRIPTION))
    for key, plain in PLAIN.items():
        if fields.get(key, plain[0]) not in plain:
            raise UserError(f"{directory} has {key} = {shown(fields[key])}, which is not supported; merge it into its "
                            "base with PEFT first")
    stored = scan([Path(directory) / WEIGHTS])
    adapters: dict[str, np.ndarray] = {}
    replaced: dict[str, np.ndarray] = {}
    used: set[str] = set()
    for entry in tensor_map(config):
        a_names, b_names, full_names = (stored_names(entry, suffix, stored, config)
                                        for suffix in (".lora_A.weight", ".lora_B.weight", ".weight"))
        used.update(a_names, b_names, full_names)
        if a_names:
            check_pairs(a_names, b_names, stored)
            pairs = [(read(a, stored[a]), read(b, stored[b])) for a, b in zip(a_names, b_names)]
            adapters |= from_pairs(entry, pairs, scale(fields, entry), config)
        if full_names:
            replaced |= from_saved(entry, full_names, stored, config)
    if stored.keys() - used:
        raise UserError(f"{directory} has tensors that this model does not have: {some(stored.keys() - used)}; "
                        "choose the base that the adapter was trained on")
    return unflatten(adapters), unflatten(replaced)


def check_base(directory: str | Path, source: str, sha256: str) -> None:
    """Raises `UserError` if the adapters of a PEFT directory were trained on other weights than those of `source`,
    whose hash is `sha256`. An adapter that does not state its base's hash, such as one made by PEFT, belongs to any."""
    fields = read_json(Path(directory) / DESCRIPTION).get(ORIGIN)
    if fields is None:
        return
    base = Origin.from_dict(fields)
    if base.sha256 != sha256:
        raise UserError(f"the adapter in {directory} was trained on {base.name} (weights {str(base.sha256)[:16]}), and "
                        f"{source} holds others (weights {sha256[:16]}); name the base that it was trained on")


def stored_names(entry: Entry, suffix: str, stored: dict[str, Stored], config: ModelConfig) -> list[str]:
    """The stored names of the module's tensors with this suffix, one per layer; empty if any layer lacks its tensor."""
    names = []
    for name, _ in entry.tensors(config):
        tail = name.removeprefix(PREFIX[config.family]).removesuffix(".weight") + suffix
        found = next((key for key in stored if key == tail or key.endswith("." + tail)), None)
        if found is None:
            return []
        names.append(found)
    return names


def check_pairs(a_names: list[str], b_names: list[str], stored: dict[str, Stored]) -> None:
    """Raises `UserError` unless the tensors are matrices [rank, inputs] and [outputs, rank], alike in all layers."""
    if len(a_names) != len(b_names):
        raise UserError(f"tensor {a_names[0]} has no lora_B beside it; copy the complete adapter")
    for names in (a_names, b_names):
        for name in names:
            check_tensor(name, stored[name], stored[names[0]].shape)
    a, b = stored[a_names[0]].shape, stored[b_names[0]].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise UserError(f"tensors {a_names[0]} and {b_names[0]} have the shapes {list(a)} and {list(b)}, which are not "
                        "[rank, inputs] and [outputs, rank]; copy the complete adapter")


def from_saved(entry: Entry, names: list[str], stored: dict[str, Stored],
               config: ModelConfig) -> dict[str, np.ndarray]:
    """Our weights, by path, from tensors that were trained in full. Raises `UserError` for another shape."""
    weights = weight_table(config)
    for name in names:
        if stored[name].shape != hf_shape(entry, weights):  # mostly the embedding, by the row of the mask
            raise UserError(f"tensor {name} has the shape {list(stored[name].shape)} and this model's has "
                            f"{list(hf_shape(entry, weights))}; give the base its mask token first, with --mask")
        check_tensor(name, stored[name], hf_shape(entry, weights))
    layers = [from_hf(entry, read(name, stored[name]), weights) for name in names]
    if not entry.stacked:
        return layers[0]
    return {path: np.stack([layer[path] for layer in layers]) for path in entry.paths}


def scale(fields: Fields, entry: Entry) -> float:
    """alpha / r of a module. Raises `UserError` if the adapter's configuration lacks either."""
    module = module_name(entry)
    alpha = (fields.get("alpha_pattern") or {}).get(module, fields.get("lora_alpha"))
    rank = (fields.get("rank_pattern") or {}).get(module, fields.get("r"))
    if not alpha or not rank:
        raise UserError(f"{DESCRIPTION} does not state r and lora_alpha; copy the complete adapter")
    return alpha / rank


@shape_checked
def from_pairs(entry: Entry, pairs: list[tuple[Float[np.ndarray, "rank inputs"], Float[np.ndarray, "outputs rank"]]],
               scale: float, config: ModelConfig) -> dict[str, np.ndarray]:
    """Our adapters, by path, from PEFT's (A, B) of one tensor in every layer, with b multiplied by `scale`.

    If the tensor holds several weights, each gets all of A and its own columns of B. Raises `UserError` for other
    shapes than the model's.
    """
    weights = weight_table(config)
    outputs = [int(np.prod(weights[path].shape[1 + input_axis_count(weights[path]):])) for path in entry.paths]
    a = np.stack([a.T for a, _ in pairs])  # [layers, inputs, rank]
    b = scale * np.stack([b.T for _, b in pairs])  # [layers, rank, outputs]
    leaves = {}
    for path, own_b in zip(entry.paths, np.split(b, np.cumsum(outputs)[:-1], axis=-1)):
        w = weights[path]
        first_output = 1 + input_axis_count(w)  # axes: layer, inputs, outputs
        matrix = int(np.prod(w.shape[1:first_output])), int(np.prod(w.shape[first_output:]))
        if matrix != (a.shape[1], own_b.shape[2]):
            raise UserError(f"the adapter of {entry.name} has the shapes {list(a.shape[1:])} and "
                            f"{list(own_b.shape[1:])}, which do not fit this model; choose the base that it was "
                            "trained on")
        leaves[f"{adapter_stem(path)}.a"] = a.reshape(*w.shape[:first_output], -1)
        leaves[f"{adapter_stem(path)}.b"] = own_b.reshape(w.shape[0], -1, *w.shape[first_output:])
    return leaves
