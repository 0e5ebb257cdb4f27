"""The families' `config.json`, read strictly into a `ModelConfig`, and written back."""

from typing import Any

from dlm_jax.convert.hf_schema import CONFIG, ROPE
from dlm_jax.errors import UserError
from dlm_jax.models.config import FAMILIES, ModelConfig, Rope
from dlm_jax.schema.json_text import shown
from dlm_jax.schema.kinds import check_fields

Fields = dict[str, Any]

# Fields that may change the computation, each with the values under which it does not. An absent field counts as None.
HARMLESS: dict[str, tuple[object, ...]] = {
    "quantization_config": (None,), "is_encoder_decoder": (None, False), "per_layer_config": (None, {}),
    "add_cross_attention": (None, False), "partial_rotary_factor": (None, 1, 1.0), "use_mrope": (None, False),
    "use_sliding_window": (None, False), "attention_chunk_size": (None,), "no_rope_layers": (None, []),
    "num_experts": (None, 0), "num_local_experts": (None, 0), "n_routed_experts": (None, 0),
    "num_experts_per_tok": (None, 0), "attn_logit_softcapping": (None,), "final_logit_softcapping": (None,),
    "clip_qkv": (None,), "logit_scale": (None, 1, 1.0), "logits_scaling": (None, 1, 1.0),
    "embedding_multiplier": (None, 1, 1.0), "residual_multiplier": (None, 1, 1.0), "attention_multiplier": (None,),
}
HARMLESS_GPT2 = HARMLESS | {
    "activation_function": (None, "gelu_new", "gelu_pytorch_tanh"), "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False), "reorder_and_upcast_attn": (None, False),
}
HARMLESS_LLAMA = HARMLESS | {"hidden_act": (None, "silu")}


def model_config(fields: Fields) -> ModelConfig:
    """The architecture in a `config.json`. Raises `UserError` naming what is missing or not supported."""
    check_fields(fields, CONFIG, "the configuration")
    family = fields.get("model_type")
    if family not in FAMILIES:
        raise UserError(f"model_type {shown(family)} is not supported; the supported ones are {', '.join(FAMILIES)}, "
                        "and the diffusion models Dream, llada, EfficientDLM, sdar, Fast_dLLM_Qwen, a2d-* and dlm")
    return gpt2_config(fields) if family == "gpt2" else llama_config(fields)


def gpt2_config(fields: Fields) -> ModelConfig:
    """GPT-2. An absent field has the default of `GPT2Config`."""
    reject_unsupported(fields, HARMLESS_GPT2)
    width, heads = require(fields, "n_embd"), require(fields, "n_head")
    return ModelConfig(
        family="gpt2", vocab_size=require(fields, "vocab_size"), width=width, depth=require(fields, "n_layer"),
        heads=heads, kv_heads=heads, head_dim=exact_quotient("n_embd", width, "n_head", heads),
        mlp_width=optional(fields, "n_inner", 4 * width), max_length=require(fields, "n_positions"), rope=None,
        norm="layer", norm_eps=float(optional(fields, "layer_norm_epsilon", 1e-5)), mlp="gelu", qkv_bias=True,
        output_bias=True, mlp_bias=True, tied_head=optional(fields, "tie_word_embeddings", True))


def llama_config(fields: Fields) -> ModelConfig:
    """LLaMA, Qwen2 and Qwen3. An absent field has the default of its `transformers` class."""
    reject_unsupported(fields, HARMLESS_LLAMA)
    unsupported = [kind for kind in fields.get("layer_types") or [] if kind != "full_attention"]
    if unsupported:
        raise UserError(f"layer_types names {shown(unsupported[0])}, which is not supported; only full_attention is")
    family = fields["model_type"]
    width, heads = require(fields, "hidden_size"), require(fields, "num_attention_heads")
    if fields.get("head_dim") is None and family != "qwen3":
        head_dim = exact_quotient("hidden_size", width, "num_attention_heads", heads)
    else:
        head_dim = optional(fields, "head_dim", 128)
    bias = family != "qwen2" and optional(fields, "attention_bias", False)  # Qwen2 has no such field
    return ModelConfig(
        family=family, vocab_size=require(fields, "vocab_size"), width=width,
        depth=require(fields, "num_hidden_layers"), heads=heads,
        kv_heads=optional(fields, "num_key_value_heads", heads), head_dim=head_dim,
        mlp_width=require(fields, "intermediate_size"), max_length=require(fields, "max_position_embeddings"),
        rope=read_rope(fields), norm="rms", norm_eps=float(optional(fields, "rms_norm_eps", 1e-6)), mlp="swiglu",
        qkv_bias=bias or family == "qwen2", output_bias=bias,
        mlp_bias=optional(fields, "mlp_bias", False) if family == "llama" else False, qk_norm=family == "qwen3",
        tied_head=optional(fields, "tie_word_embeddings", False))


def read_rope(fields: Fields) -> Rope:
    """From `rope_parameters` (transformers 5), or from `rope_theta` and `rope_scaling` (earlier versions)."""
    new, old = fields.get("rope_parameters"), fields.get("rope_scaling")
    if new and old and new != old:
        raise UserError(f"rope_parameters {shown(new)} and rope_scaling {shown(old)} contradict each other; keep one")
    rope = new or old or {}
    unknown = sorted(set(rope) - set(ROPE))
    if unknown:
        raise UserError(f"the rope setting {shown(unknown[0])}: {shown(rope[unknown[0]])} is not supported; choose "
                        "another checkpoint")
    reject_unsupported(rope, {"partial_rotary_factor": HARMLESS["partial_rotary_factor"]})
    theta = float(optional(rope, "rope_theta", optional(fields, "rope_theta", 10_000.0)))
    kind = optional(rope, "rope_type", optional(rope, "type", "default"))
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, "linear", float(require(rope, "factor")))
    if kind == "llama3":
        original = optional(rope, "original_max_position_embeddings", fields["max_position_embeddings"])
        return Rope(theta, "llama3", float(require(rope, "factor")), float(require(rope, "low_freq_factor")),
                    float(require(rope, "high_freq_factor")), original)
    raise UserError(f"rope type {shown(kind)} is not supported; the types are default, linear and llama3")


def hf_fields(config: ModelConfig) -> Fields:
    """The inverse of `model_config`. Raises `UserError` if the family's own class cannot express `config`."""
    fields = gpt2_fields(config) if config.family == "gpt2" else llama_fields(config)
    if model_config(fields) != config:
        raise UserError(f"the Hugging Face class of {config.family} cannot express this model; save it in the native "
                        f"format instead: {config}")
    return fields


def gpt2_fields(c: ModelConfig) -> Fields:
    """The inverse of `gpt2_config`."""
    return {"model_type": "gpt2", "vocab_size": c.vocab_size, "n_embd": c.width, "n_layer": c.depth, "n_head": c.heads,
            "n_inner": c.mlp_width, "n_positions": c.max_length, "layer_norm_epsilon": c.norm_eps,
            "activation_function": "gelu_new", "tie_word_embeddings": c.tied_head}


def llama_fields(c: ModelConfig) -> Fields:
    """The inverse of `llama_config`."""
    fields = {
        "model_type": c.family, "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "intermediate_size": c.mlp_width, "max_position_embeddings": c.max_length, "rms_norm_eps": c.norm_eps,
        "hidden_act": "silu", "rope_parameters": rope_fields(c.rope), "tie_word_embeddings": c.tied_head}
    if c.family != "qwen2":
        fields["attention_bias"] = c.qkv_bias
    if c.family == "llama":
        fields["mlp_bias"] = c.mlp_bias
    return fields


def rope_fields(rope: Rope | None) -> Fields:
    """The inverse of `read_rope`, in the form of transformers 5."""
    rope = rope or Rope()
    fields: Fields = {"rope_type": "default" if rope.scaling == "none" else rope.scaling, "rope_theta": rope.theta}
    if rope.scaling != "none":
        fields["factor"] = rope.factor
    if rope.scaling == "llama3":
        fields |= {"low_freq_factor": rope.low_factor, "high_freq_factor": rope.high_factor,
                   "original_max_position_embeddings": rope.original_length}
    return fields


def reject_unsupported(fields: Fields, allowed: dict[str, tuple[object, ...]]) -> None:
    """Raises `UserError` for a field whose value changes the computation in a way that is not supported."""
    for name, values in allowed.items():
        value = fields.get(name)
        if not any(type(value) is type(harmless) and value == harmless for harmless in values):
            raise UserError(f"the configuration has {name}: {shown(value)}, which is not supported; choose another "
                            "checkpoint")


def require(fields: Fields, name: str) -> Any:
    """The field. Raises `UserError` if it is absent or null."""
    if fields.get(name) is None:
        raise UserError(f"the configuration does not state {name}; add it")
    return fields[name]


def optional(fields: Fields, name: str, default: Any) -> Any:
    """The field, or `default` if it is absent or null."""
    return default if fields.get(name) is None else fields[name]


def exact_quotient(name: str, value: int, divisor_name: str, divisor: int) -> int:
    """value / divisor. Raises `UserError` unless it is an integer."""
    if value % divisor:
        raise UserError(f"{name} {value} is not a multiple of {divisor_name} {divisor}; correct the configuration")
    return value // divisor
