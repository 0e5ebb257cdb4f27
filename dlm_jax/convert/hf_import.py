"""Reads Hugging Face checkpoint directories into bundles: strictly, one tensor at a time, from safetensors only."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dlm_jax.convert import hf_schema
from dlm_jax.convert.hf_config import Fields, model_config, optional
from dlm_jax.convert.hub import INDEX, tokenizer_directory, weight_files
from dlm_jax.convert.published import Source, checked_spec, recognize
from dlm_jax.convert.tensor_map import HEAD, Entry, from_hf, hf_shape, layer_slice, tensor_map
from dlm_jax.convert.tensors import Stored, check_names, check_tensor, memory_dtype, read, scan
from dlm_jax.convert.wrapped import tokenizer_mask
from dlm_jax.errors import UserError
from dlm_jax.files import check_sums, read_json
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params, Weight, unflatten, weight_table
from dlm_jax.schema.kinds import check_fields
from dlm_jax.typing import Float, shape_checked

GENERATION = "generation_config.json"
# Constants that older checkpoints store among their weights and that the forward pass computes itself.
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def read_hf(directory: str | Path, dtype: str | np.dtype | None = None,
            spec_changes: Mapping[str, object] | None = None) -> Bundle:
    """A checkpoint of a supported family, a published diffusion checkpoint, or an export of this library.

    dtype: `float32` or `bfloat16`. By default the stored type, float16 as float32, and the widest if tensors differ.
    spec_changes: fields of `DiffusionSpec` that the checkpoint does not state, or states wrongly.
    Raises `UserError` naming the field, the tensor or the file at fault; a file whose checksum the directory states in
    `SHA256SUMS` must have it.
    """
    directory = Path(directory)
    check_sums(directory, ["config.json", GENERATION, INDEX])
    fields, files = read_json(directory / "config.json"), weight_files(directory)
    check_sums(directory, [file.name for file in files])
    stored = {name: t for name, t in scan(files).items() if not name.endswith(BUFFERS)}
    source = recognize(fields, stored)
    config = model_config(source.fields)
    spec_fields = {**token_ids(source.fields, directory), **source.spec, **(spec_changes or {})}
    if spec_fields.get("mask_token_id") is None and spec_fields.get("rule", "causal") != "causal":
        spec_fields["mask_token_id"] = tokenizer_mask(directory)
    spec = checked_spec(spec_fields, config)
    params = read_params(config, source, stored, dtype, directory)
    return Bundle(config, params, spec, tokenizer_directory(directory))


def token_ids(fields: Fields, directory: Path) -> dict[str, int | None]:
    """bos and eos, from `config.json` or else `generation_config.json`; the first one if there are several."""
    generation = directory / GENERATION
    fallback = read_json(generation) if generation.exists() else {}
    check_fields(fallback, hf_schema.GENERATION, str(generation))
    ids: dict[str, int | None] = {}
    for name in ("bos_token_id", "eos_token_id"):
        value = optional(fields, name, fallback.get(name))
        ids[name] = next(iter(value), None) if isinstance(value, list) else value
    return ids


def read_params(config: ModelConfig, source: Source, stored: Mapping[str, Stored], dtype: str | np.dtype | None,
                directory: Path) -> Params:
    """The parameters, read one tensor at a time into preallocated stacked arrays, so that peak memory stays near one
    copy of the model."""
    weights, table = weight_table(config), tensor_map(config)
    expected = expected_shapes(config, source, table, weights)
    head = source.stored_name(HEAD)
    tied_but_stored = config.tied_head and head in stored
    check_names(stored, {*expected, head} if tied_but_stored else expected, directory)
    for name, shape in expected.items():
        check_tensor(name, stored[name], shape)
    held_dtype = memory_dtype(stored.values(), dtype)
    leaves = {path: np.empty(w.shape, held_dtype) for path, w in weights.items()}
    for entry in table:
        for hf_name, layer in entry.tensors(config):
            name = source.stored_name(hf_name)
            for path, array in from_hf(entry, read(name, stored[name]), weights).items():
                layer_slice(leaves[path], layer)[...] = array
    if tied_but_stored:
        check_tied(head, stored[head], leaves["embed.tokens"])
    return unflatten(leaves)


def expected_shapes(config: ModelConfig, source: Source, table: list[Entry],
                    weights: dict[str, Weight]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the checkpoint must hold, by its name in the checkpoint."""
    return {source.stored_name(name): hf_shape(entry, weights) for entry in table for name, _ in entry.tensors(config)}


@shape_checked
def check_tied(name: str, stored: Stored, embedding: Float[np.ndarray, "v d"]) -> None:
    """Raises `UserError` if the checkpoint stores a head that differs from the embedding it is tied to."""
    check_tensor(name, stored, embedding.shape)
    if not np.array_equal(read(name, stored).astype(embedding.dtype), embedding):
        raise UserError(f"tensor {name} in {stored.file} differs from the embedding, but the configuration ties them; "
                        "set tie_word_embeddings: false if the head has weights of its own")
