"""Published diffusion checkpoints that are a supported family, tensor for tensor, under another `model_type`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dlm_jax.convert.hf_config import Fields, optional
from dlm_jax.convert.hf_schema import TOKENIZER, TOKENIZER_CONFIG
from dlm_jax.convert.tensor_map import EMBEDDING
from dlm_jax.convert.tensors import Stored
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.kinds import Schema, check_fields


class Wrapper(NamedTuple):
    """How one `model_type` denoises."""

    family: str
    alignment: str
    block_field: str = "block_size"  # what the configuration calls the block size
    block_size: int | None = None  # where the configuration states none; None: it is then bidirectional
    mask_token_id: int | None = None  # where the configuration states none; None: the tokenizer's
    recipe: str | None = None


WRAPPERS = {
    # SDAR (arXiv 2510.06303), on Qwen3.
    "sdar": Wrapper("qwen3", "same_position", block_size=4, mask_token_id=151669),
    # Fast-dLLM v2 (arXiv 2509.26328), on Qwen2.5.
    "Fast_dLLM_Qwen": Wrapper("qwen2", "shifted", "bd_size", 32, 151665, "fast_dllm_v2"),
    # dLLM (arXiv 2602.22661) saves its MDLM and its BD3LM conversions alike; only a `block_size` tells them apart.
    "a2d-llama": Wrapper("llama", "same_position"),
    "a2d-qwen2": Wrapper("qwen2", "same_position"),
    "a2d-qwen3": Wrapper("qwen3", "same_position"),
}


def unwrap(fields: Fields) -> tuple[Fields, dict[str, object]]:
    """The family's fields, and those of `DiffusionSpec`, of a checkpoint whose `model_type` is in `WRAPPERS`."""
    wrapper = WRAPPERS[fields["model_type"]]
    block_size = optional(fields, wrapper.block_field, wrapper.block_size)
    spec = {"alignment": wrapper.alignment, "rule": "bidirectional" if block_size is None else "block_causal",
            "block_size": block_size, "recipe": wrapper.recipe,
            "mask_token_id": optional(fields, "mask_token_id", wrapper.mask_token_id)}
    return fields | {"model_type": wrapper.family}, spec


def tokenizer_mask(directory: Path) -> int | None:
    """The id of the tokenizer's mask token, or None if it has none. Raises `UserError` for a damaged file."""
    mask = _read(directory / "tokenizer_config.json", TOKENIZER_CONFIG).get("mask_token")
    content = mask.get("content") if isinstance(mask, dict) else mask
    added = _read(directory / "tokenizer.json", TOKENIZER).get("added_tokens") or []
    return next((token.get("id") for token in added if content is not None and token.get("content") == content), None)


def _read(file: Path, schema: Schema) -> dict[str, Any]:
    fields = read_json(file) if file.exists() else {}
    check_fields(fields, schema, str(file))
    return fields


def refuse_unknown(fields: Fields, stored: Mapping[str, Stored]) -> None:
    """Raises `UserError` for an unknown `model_type` whose tensors have a family's names, saying what is missing."""
    family = next((name for name in ("gpt2", "qwen3", "qwen2", "llama") if _looks_like(name, stored)), None)
    if family is not None:
        raise UserError(f"model_type {shown(fields.get('model_type'))} is not supported, but its tensors have the "
                        f"names of {family}; if it computes what {family} does, set model_type to 'dlm' and "
                        f"base_model_type to '{family}' in config.json, and state alignment, rule, mask_token_id "
                        "and, for the rule block_causal, block_size there")


def _looks_like(family: str, stored: Mapping[str, Stored]) -> bool:
    sign = {"qwen3": ".self_attn.q_norm.weight", "qwen2": ".self_attn.q_proj.bias"}.get(family, "")
    return EMBEDDING[family] in stored and any(name.endswith(sign) for name in stored)
