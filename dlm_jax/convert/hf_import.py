"""Hugging Face checkpoint directories into bundles: strict, streamed, safetensors only."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dlm_jax.convert.directories import tokenizer_directory, weight_files
from dlm_jax.convert.families import HEAD, Entry, from_hf, hf_shape, tensor_table
from dlm_jax.convert.hf_config import Fields, model_config, optional
from dlm_jax.convert.tensors import Stored, check_names, check_tensor, memory_dtype, read, scan
from dlm_jax.convert.wild import Source, recognise, settle
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Weight, unflatten, weight_table

# Constants that older checkpoints carry among their weights and that the forward pass computes itself.
BUFFERS = (".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")


def read_hf(directory: str | Path, dtype: str | np.dtype | None = None,
            card_changes: Mapping[str, Any] | None = None) -> Bundle:
    """A checkpoint of a family, a published diffusion checkpoint, or an export of this library.

    dtype: `float32` or `bfloat16`; by default as stored, float16 as float32, the widest where the tensors differ.
    card_changes: fields of `Card` that the checkpoint does not say or says wrongly.
    Raises `UserError` that names the field or the tensor at fault.
    """
    directory = Path(directory)
    fields = read_json(directory / "config.json")
    stored = {name: t for name, t in scan(weight_files(directory)).items() if not name.endswith(BUFFERS)}
    source = recognise(fields, stored)
    config = model_config(source.fields)
    card = settle({**token_ids(source.fields, directory), **source.card, **(card_changes or {})}, config.vocab_size)
    params = read_params(config, source, stored, dtype, directory)
    return Bundle(config, params, card, tokenizer_directory(directory))


def token_ids(fields: Fields, directory: Path) -> dict[str, int | None]:
    """bos and eos, from `config.json` or else `generation_config.json`; the first where there are several."""
    generation = directory / "generation_config.json"
    fallback = read_json(generation) if generation.exists() else {}
    ids: dict[str, int | None] = {}
    for name in ("bos_token_id", "eos_token_id"):
        value = optional(fields, name, fallback.get(name))
        ids[name] = next(iter(value), None) if isinstance(value, list) else value
    return ids


def read_params(config: ModelConfig, source: Source, stored: Mapping[str, Stored], dtype: str | np.dtype | None,
                directory: Path) -> dict[str, Any]:
    """The parameters, read one tensor at a time into stacked arrays, so that the peak stays near one copy."""
    weights, table = weight_table(config), tensor_table(config)
    expected = expected_shapes(config, source, table, weights)
    head = source.stored_name(HEAD)
    spare = {head} if config.tied_head and head in stored else set()
    check_names(stored, {*expected, *spare}, directory)
    for name, shape in expected.items():
        check_tensor(name, stored[name], shape)
    kept = memory_dtype(stored.values(), dtype)
    leaves = {path: np.empty(w.shape, kept) for path, w in weights.items()}
    for entry in table:
        for i in range(config.depth if entry.stacked else 1):
            name = source.stored_name(entry.name.format(i=i))
            for path, part in from_hf(entry, read(name, stored[name]), weights).items():
                leaves[path][i if entry.stacked else ...] = part
    if spare:
        check_tied(head, stored[head], leaves["embed.tokens"])
    return unflatten(leaves)


def expected_shapes(config: ModelConfig, source: Source, table: list[Entry],
                    weights: dict[str, Weight]) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor that the checkpoint must hold, by its name there."""
    return {source.stored_name(entry.name.format(i=i)): hf_shape(entry, weights)
            for entry in table for i in range(config.depth if entry.stacked else 1)}


def check_tied(name: str, stored: Stored, embedding: np.ndarray) -> None:
    """Raises `UserError` where a head is stored that is not the embedding though the configuration ties them."""
    check_tensor(name, stored, embedding.shape)
    if not np.array_equal(read(name, stored).astype(embedding.dtype), embedding):
        raise UserError(f"tensor {name} in {stored.file} differs from the embedding, but the configuration ties them; "
                        "say tie_word_embeddings: false if the head is its own")
