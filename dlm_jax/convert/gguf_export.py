"""Writes a model as a GGUF file, which llama.cpp runs on any laptop, by the `gguf` package.

A diffusion model of one stream becomes llama.cpp's architecture `dream`, for `llama-diffusion-cli`; it has Qwen2's
tensors, with or without biases, so a LLaMA fits it too, and `diffusion.shift_logits` states the alignment. What writes
left to right becomes its own family, for `llama-cli`. llama.cpp reimplements tokenizers, so the tokenizer must be of a
kind that it knows.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from dlm_jax.convert.hf_export import outgoing
from dlm_jax.convert.layouts import autoregressive
from dlm_jax.convert.model_card import CardOptions, model_card
from dlm_jax.convert.published import Renames, renamed
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.models.bundle import Bundle
from dlm_jax.models.config import ModelConfig

FILE = "model.gguf"
DTYPES = {"float32": "F32", "float16": "F16", "q8_0": "Q8_0"}  # ours: the name in `gguf.GGMLQuantizationType`
NAMES: Renames = (  # Hugging Face: GGUF
    ("model.embed_tokens.", "token_embd."), ("lm_head.", "output."), ("model.norm.", "output_norm."),
    ("model.layers.", "blk."), ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.o_proj", "attn_output"), ("self_attn.", "attn_"), ("mlp.", "ffn_"), ("_proj", ""))
QWEN2_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
               r"|\s+(?!\S)|\s+")
# llama-diffusion-cli always puts a prompt into a chat template: this one leaves it as it is.
AS_IT_IS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6  # `gguf.TokenType`


def write_gguf(directory: Path, bundle: Bundle, dtype: str | None = None, **card: Unpack[CardOptions]) -> None:
    """Writes `model.gguf` and a model card into the existing `directory`, which holds the tokenizer's files.

    dtype: `float32`, `float16` (default) or `q8_0`, of the matrices; vectors stay fp32. card: what the model card says
    beyond what the model itself knows. Raises `UserError` for another dtype, for a model or a tokenizer that llama.cpp
    does not know, and where `gguf` is not installed.
    """
    gguf = load_gguf()
    quantization = gguf.GGMLQuantizationType[DTYPES[check_dtype(dtype)]]
    check_gguf(bundle)
    if bundle.spec.visibility == "token_causal":
        bundle = autoregressive(bundle)
    writer = gguf.GGUFWriter(directory / FILE, architecture(bundle))
    write_fields(writer, bundle)
    write_tokenizer(writer, bundle, directory)
    for name, array in tensors(bundle):
        kind = quantization if array.ndim > 1 else gguf.GGMLQuantizationType.F32
        if kind == gguf.GGMLQuantizationType.Q8_0 and array.shape[-1] % 32:  # its blocks are of 32
            kind = gguf.GGMLQuantizationType.F16
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (directory / "README.md").write_text(model_card(bundle, {"llama.cpp": command(bundle)}, loads=False, **card),
                                         encoding="utf-8")


def command(bundle: Bundle) -> str:
    """The command of llama.cpp that runs the file."""
    if not bundle.spec.is_diffusion:
        return f"llama-cli -m {{path}}/{FILE}"
    return f"llama-diffusion-cli -m {{path}}/{FILE} -ub 128 --diffusion-steps 64 --diffusion-block-length 32 -p PROMPT"


def load_gguf() -> Any:
    """The `gguf` package. Raises `UserError` where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("the layout gguf needs the package of that name; install it with pip install "
                        "'dlm-jax[gguf]'") from None
    return gguf


def check_dtype(dtype: str | None) -> str:
    """The dtype of the matrices. Raises `UserError` for one that the layout has not."""
    if dtype not in (None, *DTYPES):
        raise UserError(f"the layout gguf has no {dtype}; choose one of {', '.join(DTYPES)}")
    return dtype or "float16"


def check_gguf(bundle: Bundle) -> None:
    """Raises `UserError` for a model that llama.cpp cannot run."""
    config, spec = bundle.config, bundle.spec
    families = ("llama", "qwen2") if spec.visibility == "bidirectional" else ("llama", "qwen2", "qwen3")
    if spec.visibility == "block_causal":
        raise UserError("llama.cpp has no block diffusion, and the layout gguf takes models of one stream or with a "
                        "token-causal clean half; choose another layout")
    if config.family not in families:
        raise UserError(f"the layout gguf takes {' and '.join(families)} here, and this model is a {config.family}; "
                        "choose another layout")
    if config.rope is None or config.rope.scaling != "none":
        raise UserError("the layout gguf has no scaling of rope; choose another layout")
    if config.output_bias or config.mlp_bias:
        raise UserError("the layout gguf has no biases outside q, k and v; choose another layout")
    if bundle.config.heads * config.head_dim != config.width:
        raise UserError("in the layout gguf the heads together have the model's width; choose another layout")


def architecture(bundle: Bundle) -> str:
    """llama.cpp's name for the model's architecture."""
    return "dream" if bundle.spec.is_diffusion else bundle.config.family


def write_fields(writer: Any, bundle: Bundle) -> None:
    """The model's shape, and how it denoises."""
    config, spec = bundle.config, bundle.spec
    assert config.rope is not None
    writer.add_context_length(config.max_length)
    writer.add_embedding_length(config.width)
    writer.add_block_count(config.depth)
    writer.add_feed_forward_length(config.mlp_width)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    if spec.is_diffusion:
        writer.add_causal_attention(False)
        # llama.cpp reads the text of the value, so it is no Boolean.
        writer.add_string("diffusion.shift_logits", "true" if spec.alignment == "shifted" else "false")
        writer.add_mask_token_id(spec.mask_token_id)


def tensors(bundle: Bundle) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its GGUF name, fp32."""
    for tensor in outgoing(bundle, "float32"):
        array = np.ascontiguousarray(tensor.make())
        if architecture(bundle) == "llama" and re.search(r"[qk]_proj", tensor.name):
            array = interleaved(array, bundle.config)
        yield gguf_name(tensor.name), array


def gguf_name(name: str) -> str:
    """The GGUF name of a Hugging Face tensor."""
    return renamed(name, NAMES)


def interleaved(array: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The rows of q or k in the order in which the architecture `llama` rotates them: (i, i + head_dim / 2) side by
    side."""
    pairs = array.reshape(-1, 2, config.head_dim // 2, *array.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(array.shape))


def write_tokenizer(writer: Any, bundle: Bundle, directory: Path) -> None:
    """The tokenizer, from `tokenizer.json`. Raises `UserError` for one that llama.cpp does not have."""
    file = directory / "tokenizer.json"
    fields = read_json(file) if file.exists() else {}
    model, spec = fields.get("model", {}), bundle.spec
    kind = kind_of(fields)
    special = {each["content"]: each["id"] for each in fields.get("added_tokens", [])}
    names = {index: token for token, index in (model["vocab"] | special).items()}
    tokens = [names.get(index, f"[UNUSED{index}]") for index in range(bundle.config.vocab_size)]
    types = [type_of(index, token, names, special, model) for index, token in enumerate(tokens)]
    writer.add_tokenizer_model("llama" if kind == "llama" else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if kind == "llama":
        rank = {merge.replace(" ", ""): index for index, merge in reversed(list(enumerate(merges)))}
        writer.add_token_scores([-float(rank.get(token, len(merges))) for token in tokens])
        writer.add_add_space_prefix(True)
    else:
        writer.add_tokenizer_pre(kind)
        writer.add_token_merges(merges)
    writer.add_add_bos_token(spec.bos_token_id is not None)
    for add, token in ((writer.add_bos_token_id, spec.bos_token_id), (writer.add_eos_token_id, spec.eos_token_id)):
        if token is not None:
            add(token)
    template = chat_template(directory) or (AS_IT_IS if spec.is_diffusion else None)
    if template:
        writer.add_chat_template(template)


def chat_template(directory: Path) -> str | None:
    """The chat template that stands beside the tokenizer, if there is one."""
    file, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    if file.exists():
        return file.read_text(encoding="utf-8")
    return read_json(config).get("chat_template") if config.exists() else None


def kind_of(fields: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer cuts a text before its merges: `llama` is SentencePiece's. Raises
    `UserError` for another."""
    model, pre = fields.get("model", {}), fields.get("pre_tokenizer")
    if model.get("type") == "BPE" and model.get("byte_fallback") and pre is None:
        return "llama"
    steps = [] if pre is None else pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds = [step["type"] for step in steps]
    if model.get("type") == "BPE" and kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and steps[1]["use_regex"]:
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and steps[0]["pattern"] == {"Regex": QWEN2_SPLIT}:
        return "qwen2"
    raise UserError("llama.cpp has no tokenizer that cuts texts as this model's does, and the layout gguf carries the "
                    "tokenizer; choose another layout")


def type_of(index: int, token: str, names: dict[int, str], special: dict[str, int], model: dict[str, Any]) -> int:
    """The `gguf.TokenType` of a token."""
    if index not in names:
        return UNUSED
    if token == model.get("unk_token"):
        return UNKNOWN
    if token in special:
        return CONTROL
    return BYTE if model.get("byte_fallback") and re.fullmatch(r"<0x[0-9A-F]{2}>", token) else NORMAL
