"""A model at rest: architecture, parameters, card, and where its tokenizer files are."""

import dataclasses
from pathlib import Path

from dlm_jax.models.card import Card
from dlm_jax.models.config import ModelConfig
from dlm_jax.models.weights import Params


@dataclasses.dataclass(frozen=True)
class Bundle:
    """`params` holds numpy or jax arrays as in `weight_table(config)`, all of one dtype.

    `tokenizer_dir` is the directory that has the tokenizer files, None where there are none.
    """

    config: ModelConfig
    params: Params
    card: Card
    tokenizer_dir: Path | None = None
