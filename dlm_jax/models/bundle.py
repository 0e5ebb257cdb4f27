"""A loaded model: architecture, parameters, diffusion spec, and where its tokenizer files are."""

import dataclasses
from pathlib import Path

from dlm_jax.models.config import ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.models.weights import Params


@dataclasses.dataclass(frozen=True)
class Bundle:
    """What loading a checkpoint gives, and what exporting one takes."""

    config: ModelConfig
    params: Params  # numpy or jax arrays as in `weight_table(config)`, all of one dtype
    spec: DiffusionSpec
    tokenizer_dir: Path | None = None  # the directory of the tokenizer files; None where there are none
