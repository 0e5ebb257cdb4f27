"""Published diffusion checkpoints: how each maps onto a supported family and a `DiffusionSpec`."""

import dataclasses
from collections.abc import Mapping

from dlm_jax.convert.hf_config import Fields, optional, reject_unsupported, require
from dlm_jax.convert.hf_schema import CONFIG
from dlm_jax.convert.tensor_map import EMBEDDING, PREFIX
from dlm_jax.convert.tensors import Stored
from dlm_jax.convert.wrapped import WRAPPERS, refuse_unknown, unwrap
from dlm_jax.errors import UserError
from dlm_jax.models.config import FAMILIES, ModelConfig
from dlm_jax.models.diffusion_spec import DiffusionSpec
from dlm_jax.schema.kinds import check_fields

Renames = tuple[tuple[str, str], ...]  # (old, new), applied in order to the family's tensor names


def renamed(name: str, renames: Renames) -> str:
    """The other name of the family's tensor `name`."""
    for old, new in renames:
        name = name.replace(old, new)
    return name


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint, described as a member of a supported family."""

    fields: Fields  # a `config.json` of the family
    spec: Mapping[str, object]  # the fields of `DiffusionSpec` that the checkpoint determines
    renames: Renames = ()

    def stored_name(self, name: str) -> str:
        """The checkpoint's name for the family's tensor `name`."""
        return renamed(name, self.renames)


def recognize(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """What the checkpoint is. Raises `UserError` for a field that is not of its kind in `CONFIG`, and for a
    `model_type` that is unknown."""
    check_fields(fields, CONFIG, "the configuration")
    if fields.get("model_type") == "dlm":
        return dlm_export(fields)
    if "EfficientDLM" in (fields.get("architectures") or []):
        return efficient_dlm(fields, stored)
    if fields.get("model_type") == "Dream":
        return dream(fields)
    if fields.get("model_type") == "llada":
        return llada(fields)
    if any(name.startswith("denoise_model.") for name in stored):
        return diffugpt(fields, stored)
    if any("StableDiffcoder" in name for name in fields.get("architectures") or []):
        return stable_diffcoder(fields)
    if fields.get("model_type") in WRAPPERS:
        family, spec = unwrap(fields)
        return Source(family, spec | recorded(fields))
    if fields.get("model_type") not in FAMILIES:
        refuse_unknown(fields, stored)
    return autoregressive(fields, stored)


SPEC_FIELDS = {field.name for field in dataclasses.fields(DiffusionSpec)}
# What an export of an autoregressive model states beyond the family's fields.
RECORDED = ("mask_token_id", "recipe", "base_model", "base_revision")
TOKEN_IDS = ("mask_token_id", "bos_token_id", "eos_token_id")


def dlm_export(fields: Fields) -> Source:
    """An export of a diffusion model by this library."""
    spec = {name: fields[name] for name in SPEC_FIELDS if name in fields}
    return Source(fields | {"model_type": fields.get("base_model_type")}, spec)


def autoregressive(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """A checkpoint of the family's own class, or of its bare transformer, whose tensor names lack the prefix.

    The extra fields of an export by this library (`RECORDED`) are read back.
    """
    spec = {name: fields[name] for name in RECORDED if name in fields}
    family = fields.get("model_type", "")
    bare = family in PREFIX and EMBEDDING[family].removeprefix(PREFIX[family]) in stored
    return Source(fields, spec, ((PREFIX[family], ""),) if bare else ())


def diffugpt(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """DiffuGPT (arXiv 2410.17891): S reuses token 10541 as its mask, M adds a row for it, 50257.

    The number of embedding rows distinguishes them; the vocabulary size in the configuration may still be GPT-2's.
    """
    rows = stored["embed_tokens.weight"].shape[0] if "embed_tokens.weight" in stored else require(fields, "vocab_size")
    mask = {50257: 10541, 50258: 50257}.get(rows, fields.get("mask_token_id"))
    spec = {"alignment": "shifted", "rule": "bidirectional", "recipe": "diffullama", "mask_token_id": mask}
    return Source(fields | {"model_type": "gpt2", "vocab_size": rows}, spec,
                  (("transformer.wte.", "embed_tokens."), ("transformer.", "denoise_model.")))


def dream(fields: Fields) -> Source:
    """Dream 7B (arXiv 2508.15487): Qwen2.5 made bidirectional, keeping the shift.

    Its successors under the same `model_type` decode in blocks without the shift; their `block_size` gives them away.
    """
    reject_unsupported(fields, {"block_size": (None,)})
    spec = {"alignment": "shifted", "rule": "bidirectional", "mask_token_id": require(fields, "mask_token_id")}
    return Source(fields | {"model_type": "qwen2"}, spec)


def efficient_dlm(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """Efficient-DLM (arXiv 2512.14067): Qwen3 made block-causal, without the shift; its mask is <|fim_pad|>."""
    spec = {"alignment": "same_position", "rule": "block_causal", "recipe": "efficient_dlm",
            "block_size": require(fields, "block_size"), "mask_token_id": optional(fields, "mask_token_id", 151662)}
    # The class names the transformer `encoder` and the head `diffusion_head`; related checkpoints keep Qwen's names.
    encoder = any(name.startswith("encoder.") for name in stored)
    renames = (("model.", "encoder."), ("lm_head.", "diffusion_head.")) if encoder else ()
    return Source(fields | {"model_type": "qwen3"}, spec, renames)


def stable_diffcoder(fields: Fields) -> Source:
    """Stable-DiffCoder (arXiv 2601.15892): LLaMA made block-causal, without the shift."""
    spec = {"alignment": "same_position", "rule": "block_causal", "block_size": optional(fields, "block_size", 4),
            "mask_token_id": require(fields, "mask_token_id")}
    return Source(fields, spec | recorded(fields))


def recorded(fields: Fields) -> Fields:
    """What our own export states besides."""
    return {name: fields[name] for name in ("recipe", "base_model", "base_revision") if fields.get(name) is not None}


LLADA_HARMLESS = {
    "block_type": ("llama",), "layer_norm_type": ("rms",), "activation_type": ("silu",), "rope": (True,),
    "alibi": (None, False), "include_bias": (None, False), "include_qkv_bias": (None, False),
    "bias_for_layer_norm": (None, False), "attention_layer_norm": (None, False), "input_emb_norm": (None, False),
    "scale_logits": (None, False), "layer_norm_with_affine": (None, True), "block_group_size": (None, 1),
    "multi_query_attention": (None, False), "quantization_config": (None,), "rope_scaling": (None,),
}
LLADA_NAMES = (
    ("model.layers.", "model.transformer.blocks."), (".self_attn.o_proj.", ".attn_out."), (".self_attn.", "."),
    (".mlp.gate_proj.", ".ff_proj."), (".mlp.up_proj.", ".up_proj."), (".mlp.down_proj.", ".ff_out."),
    (".input_layernorm.", ".attn_norm."), (".post_attention_layernorm.", ".ff_norm."),
    ("model.embed_tokens.", "model.transformer.wte."), ("model.norm.", "model.transformer.ln_f."),
    ("lm_head.", "model.transformer.ff_out."),
)


def llada(fields: Fields) -> Source:
    """LLaDA 8B (arXiv 2502.09992): LLaMA with OLMo's names. Raises `UserError` for another type of block."""
    reject_unsupported(fields, LLADA_HARMLESS)
    width, heads = require(fields, "d_model"), require(fields, "n_heads")
    llama = {
        "model_type": "llama", "vocab_size": optional(fields, "embedding_size", fields.get("vocab_size")),
        "hidden_size": width, "num_hidden_layers": require(fields, "n_layers"), "num_attention_heads": heads,
        "num_key_value_heads": optional(fields, "n_kv_heads", heads),
        "intermediate_size": optional(fields, "mlp_hidden_size", optional(fields, "mlp_ratio", 4) * width),
        "max_position_embeddings": require(fields, "max_sequence_length"),
        "rms_norm_eps": optional(fields, "rms_norm_eps", 1e-5), "rope_theta": optional(fields, "rope_theta", 10_000.0),
        "tie_word_embeddings": require(fields, "weight_tying"),
        "bos_token_id": fields.get("bos_token_id"), "eos_token_id": fields.get("eos_token_id")}
    spec = {"alignment": "same_position", "rule": "bidirectional",
            "mask_token_id": optional(fields, "mask_token_id", 126336)}
    return Source(llama, spec | recorded(fields), LLADA_NAMES)


def checked_spec(spec: Mapping[str, object], config: ModelConfig) -> DiffusionSpec:
    """The spec of a model, checked. Raises `UserError` for a missing mask token that is needed, for a mask, start or
    end token that is not in the vocabulary, and for blocks longer than the context."""
    checked = DiffusionSpec.from_dict(dict(spec))
    if checked.block_size is not None and checked.block_size > config.max_length:
        raise UserError(f"block_size {checked.block_size} is longer than the context of {config.max_length} "
                        "tokens; correct it")
    if checked.is_diffusion and checked.mask_token_id is None:
        raise UserError("the checkpoint does not state its mask token; set mask_token_id")
    for name in TOKEN_IDS:
        value = getattr(checked, name)
        if value is not None and not 0 <= value < config.vocab_size:
            raise UserError(f"{name} {value} is not in the vocabulary of {config.vocab_size} tokens; set another")
    return checked
