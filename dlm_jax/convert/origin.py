"""The model that adapters were trained on, so that they are never merged into another one.

It is written beside the base that a work directory keeps, and into the `adapter_config.json` of an exported adapter.
"""

import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np

from dlm_jax.convert.hf_config import Fields
from dlm_jax.files import read_json
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import MAX_ROWS
from dlm_jax.models.weights import flatten, weight_table
from dlm_jax.schema.ranges import between
from dlm_jax.schema.record import from_json

FILE = "origin.json"


@dataclasses.dataclass(frozen=True)
class Origin:
    """A base, before it was given a mask token."""

    name: str  # its directory or hub id, as the config of the run spells it
    revision: str | None  # its commit, if `name` is a hub id whose commit is known
    sha256: str  # of its weights: see `weights_sha256`
    vocab_size: int = dataclasses.field(metadata=between(1, MAX_ROWS))  # rows of its embedding
    mask: str | None  # what gave it its mask token, as `dlm import --mask` takes it; None for autoregressive training

    @classmethod
    def from_dict(cls, fields: Fields) -> "Origin":
        """The inverse of `dataclasses.asdict`. Raises `UserError` for fields of another version."""
        return from_json(cls, fields, "the description of the base")


def origin_of(bundle: Bundle, name: str, mask: str | None) -> Origin:
    """The origin of adapters that are trained on `bundle`, loaded as `name`."""
    revision = bundle.spec.base_revision if bundle.spec.base_model == name else None
    return Origin(name, revision, weights_sha256(bundle), bundle.config.vocab_size, mask)


def weights_sha256(bundle: Bundle) -> str:
    """The SHA-256, in hexadecimal, of the weights as fp32, in the order of the weight table, each after its path and
    shape. It depends neither on the layout of the files nor on the dtype, as long as that holds the same numbers."""
    leaves, digest = flatten(bundle.params), hashlib.sha256()
    for path, weight in weight_table(bundle.config).items():
        digest.update(f"{path} {weight.shape}\n".encode())
        for part in np.asarray(leaves[path]):  # one layer at a time, so that a copy in fp32 stays small
            digest.update(np.ascontiguousarray(part, "<f4").data)
    return digest.hexdigest()


def write_origin(directory: Path, origin: Origin) -> None:
    """Writes `origin` into the existing `directory`."""
    (directory / FILE).write_text(json.dumps(dataclasses.asdict(origin), indent=2) + "\n", encoding="utf-8")


def read_origin(directory: Path) -> Origin:
    """The inverse of `write_origin`. Raises `UserError` if there is none."""
    return Origin.from_dict(read_json(directory / FILE))
