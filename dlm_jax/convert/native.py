"""The native model directory: `dlm.json`, safetensors files that hold the weights under our own paths, and the
checksums of all files, tokenizer included, in `SHA256SUMS`."""

import dataclasses
import functools
import json
import re
from pathlib import Path

import numpy as np

from dlm_jax.convert.hf_config import Fields
from dlm_jax.convert.hub import tokenizer_directory
from dlm_jax.convert.published import checked_spec
from dlm_jax.convert.tensors import Outgoing, check_names, check_tensor, memory_dtype, read, scan, write_sharded
from dlm_jax.errors import UserError
from dlm_jax.files import check_sums, read_json, write_sums
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import flatten, unflatten, weight_table

FORMAT = 1
DESCRIPTION = "dlm.json"
SHARD_BYTES = 2**30
SHARD = re.compile(r"params-\d{5}-of-(\d{5})\.safetensors")


def write_native(directory: Path, bundle: Bundle) -> None:
    """Writes `bundle` into the existing `directory`, with one weight in host memory at a time, and the checksums of all
    files that are then in it."""
    leaves = flatten(bundle.params)
    tensors = [Outgoing(path, w.shape, np.dtype(leaves[path].dtype), functools.partial(np.asarray, leaves[path]))
               for path, w in weight_table(bundle.config).items()]
    write_sharded(directory, tensors, "params", SHARD_BYTES)
    text = json.dumps(description(bundle.config, bundle.spec), indent=2) + "\n"
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")
    write_sums(directory)


def description(config: ModelConfig, spec: DiffusionSpec) -> Fields:
    """What `dlm.json` says of a model."""
    return {"format": FORMAT, "model": dataclasses.asdict(config), **dataclasses.asdict(spec)}


def read_native(directory: str | Path) -> Bundle:
    """The inverse of `write_native`; the parameters are numpy arrays.

    Raises `UserError` naming the field, file or tensor at fault.
    """
    directory = Path(directory)
    files = shards(directory)
    check_sums(directory, [DESCRIPTION, *(file.name for file in files)], required=True)
    stated = read_json(directory / DESCRIPTION)
    if type(stated.get("format")) is not int or stated["format"] != FORMAT:
        raise UserError(f"{directory / DESCRIPTION} is not of format {FORMAT}; read it with the version that wrote it")
    config = ModelConfig.from_dict(stated.get("model"))
    spec = checked_spec({name: value for name, value in stated.items() if name not in ("format", "model")}, config)
    if stated != description(config, spec):
        raise UserError(f"{directory / DESCRIPTION} lacks some of the fields that it was written with; copy it again")
    weights, stored = weight_table(config), scan(files)
    check_names(stored, weights, directory)
    for path, w in weights.items():
        check_tensor(path, stored[path], w.shape)
    dtype = memory_dtype(stored.values(), None)
    params = unflatten({path: read(path, stored[path]).astype(dtype, copy=False) for path in weights})
    return Bundle(config, params, spec, tokenizer_directory(directory))


def shards(directory: Path) -> list[Path]:
    """All files that hold weights. Raises `UserError` if one is missing."""
    counts = {int(match[1]) for path in directory.iterdir() if (match := SHARD.fullmatch(path.name))}
    if not counts:
        raise UserError(f"{directory} has no params-*.safetensors; copy the entire directory")
    files = [directory / f"params-{i:05d}-of-{n:05d}.safetensors" for n in sorted(counts) for i in range(1, n + 1)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(f"{directory} lacks {missing[0]}; copy the entire directory")
    return files
