"""Diffusion checkpoints as they are published: what each one is in the terms of a family and of a `Card`."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dlm_jax.convert.families import EMBEDDING, PREFIX
from dlm_jax.convert.hf_config import Fields, need, optional, refuse_others, size
from dlm_jax.convert.tensors import Stored
from dlm_jax.errors import UserError
from dlm_jax.models.card import Card


@dataclasses.dataclass(frozen=True)
class Source:
    """A checkpoint in the terms of a family.

    fields: a `config.json` of the family. card: the part of `Card` that the checkpoint settles. renames: replacements
    that turn the family's tensor names into the checkpoint's, one after the other.
    """

    fields: Fields
    card: dict[str, Any]
    renames: tuple[tuple[str, str], ...] = ()

    def stored_name(self, name: str) -> str:
        for old, new in self.renames:
            name = name.replace(old, new)
        return name


def recognise(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """What the checkpoint is; an unknown `model_type` is passed on as it is."""
    if fields.get("model_type") == "dlm":
        return own(fields)
    if "EfficientDLM" in (fields.get("architectures") or []):
        return efficient_dlm(fields, stored)
    if fields.get("model_type") == "Dream":
        return dream(fields)
    if fields.get("model_type") == "llada":
        return llada(fields)
    if any(name.startswith("denoise_model.") for name in stored):
        return diffugpt(fields, stored)
    return autoregressive(fields, stored)


CARD_FIELDS = {field.name for field in dataclasses.fields(Card)}
# What an export of an autoregressive model says beside the ordinary fields.
RECORDED = ("mask_token_id", "recipe", "base_model", "base_revision")


def own(fields: Fields) -> Source:
    """An export of this library."""
    card = {name: fields[name] for name in CARD_FIELDS if name in fields}
    return Source(fields | {"model_type": fields.get("base_model_type")}, card)


def autoregressive(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """A checkpoint of the family's own class, or of its bare transformer, whose names lack the first part.

    What an export of this library recorded beside the ordinary fields is read back.
    """
    card = {name: fields[name] for name in RECORDED if name in fields}
    family = fields.get("model_type", "")
    bare = family in PREFIX and EMBEDDING[family].removeprefix(PREFIX[family]) in stored
    return Source(fields, card, ((PREFIX[family], ""),) if bare else ())


def diffugpt(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """DiffuGPT (arXiv 2410.17891): S reuses token 10541 as its mask, M has a row of its own, 50257.

    The rows of the embedding tell which; the vocabulary size in the configuration may still be that of GPT-2.
    """
    rows = stored["embed_tokens.weight"].shape[0] if "embed_tokens.weight" in stored else need(fields, "vocab_size")
    mask = {50257: 10541, 50258: 50257}.get(rows, fields.get("mask_token_id"))
    card = {"alignment": "shifted", "rule": "bidirectional", "recipe": "diffullama", "mask_token_id": mask}
    return Source(fields | {"model_type": "gpt2", "vocab_size": rows}, card,
                  (("transformer.wte.", "embed_tokens."), ("transformer.", "denoise_model.")))


def dream(fields: Fields) -> Source:
    """Dream 7B (arXiv 2508.15487): Qwen2.5 made bidirectional, the shift kept.

    Its successors under the same `model_type` decode in blocks and drop the shift; their `block_size` gives them away.
    """
    refuse_others(fields, {"block_size": (None,)})
    card = {"alignment": "shifted", "rule": "bidirectional", "mask_token_id": need(fields, "mask_token_id")}
    return Source(fields | {"model_type": "qwen2"}, card)


def efficient_dlm(fields: Fields, stored: Mapping[str, Stored]) -> Source:
    """Efficient-DLM (arXiv 2512.14067): Qwen3 made block-causal, the shift dropped. Its mask is Qwen's <|fim_pad|>."""
    card = {"alignment": "same_position", "rule": "block_causal", "recipe": "efficient_dlm",
            "block_size": need(fields, "block_size"), "mask_token_id": optional(fields, "mask_token_id", 151662)}
    # The class holds the transformer as `encoder` and the head as `diffusion_head`; its relatives keep Qwen's names.
    encoder = any(name.startswith("encoder.") for name in stored)
    renames = (("model.", "encoder."), ("lm_head.", "diffusion_head.")) if encoder else ()
    return Source(fields | {"model_type": "qwen3"}, card, renames)


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
    """LLaDA 8B (arXiv 2502.09992): LLaMA under the names of OLMo. Raises `UserError` for another shape of block."""
    refuse_others(fields, LLADA_HARMLESS)
    width, heads = size(fields, "d_model"), size(fields, "n_heads")
    llama = {
        "model_type": "llama", "vocab_size": optional(fields, "embedding_size", fields.get("vocab_size")),
        "hidden_size": width, "num_hidden_layers": need(fields, "n_layers"), "num_attention_heads": heads,
        "num_key_value_heads": optional(fields, "n_kv_heads", heads),
        "intermediate_size": optional(fields, "mlp_hidden_size", optional(fields, "mlp_ratio", 4) * width),
        "max_position_embeddings": need(fields, "max_sequence_length"),
        "rms_norm_eps": optional(fields, "rms_norm_eps", 1e-5), "rope_theta": optional(fields, "rope_theta", 10_000.0),
        "tie_word_embeddings": need(fields, "weight_tying"),
        "bos_token_id": fields.get("bos_token_id"), "eos_token_id": fields.get("eos_token_id")}
    card = {"alignment": "same_position", "rule": "bidirectional",
            "mask_token_id": optional(fields, "mask_token_id", 126336)}
    return Source(llama, card, LLADA_NAMES)


def settle(card: Mapping[str, Any], vocab_size: int) -> Card:
    """The card. Raises `UserError` for a mask token that is missing where one is needed, or not in the vocabulary."""
    settled = Card.from_dict(dict(card))
    mask = settled.mask_token_id
    if settled.is_diffusion and mask is None:
        raise UserError("the checkpoint does not say which token is its mask; give mask_token_id")
    if mask is not None and not 0 <= mask < vocab_size:
        raise UserError(f"mask_token_id {mask} is not in the vocabulary of {vocab_size} tokens")
    return settled
