"""Layouts of an export: the names and fields by which an inference engine knows a model.

A layout keeps the weights as they are: it renames tensors, writes another `config.json`, and where our PyTorch code can
load it, a few lines that give that code the class name the engine looks for. `convert/published.py` reads each back.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from dlm_jax.convert.hf_config import Fields
from dlm_jax.convert.published import LLADA_NAMES, Renames
from dlm_jax.errors import UserError
from dlm_jax.files import read_json
from dlm_jax.models.bundle import Bundle

FIXED_MASK = 151669  # SGLang and LMDeploy take no other mask id for SDAR
CODE = '''"""The class that engines know this model by; what it computes is in modeling_dlm.py."""

from .modeling_dlm import DLMConfig, DLMModel


class {name}Config(DLMConfig):
    model_type = "{model_type}"


class {name}ForCausalLM(DLMModel):
    config_class = {name}Config
'''


class Layout(NamedTuple):
    """One layout. needs: for each property of a model the values that it can express."""

    needs: Mapping[str, tuple[str, ...]]
    engines: Mapping[str, str]  # who reads it, and the command that serves it; "" where the engine is used from Python
    model_type: str = ""
    name: str = ""  # of the class, before ForCausalLM
    block_field: str = "block_size"
    own_code: bool = True  # whether our PyTorch code loads it
    renames: Renames = ()  # of the family's tensors


BLOCKS = {"rule": ("block_causal",), "visibility": ("block_causal",)}
LAYOUTS = {
    "dlm": Layout({"rule": ("bidirectional", "block_causal")}, {}),
    "ar": Layout({"visibility": ("causal", "token_causal"), "alignment": ("shifted",)}, {
        "vLLM": "vllm serve {path}", "SGLang": "python -m sglang.launch_server --model-path {path}",
        "llama.cpp (convert_hf_to_gguf.py)": ""}),
    "sdar": Layout(BLOCKS | {"family": ("qwen3",), "alignment": ("same_position",)}, {
        "SGLang": "python -m sglang.launch_server --model-path {path} --trust-remote-code --dllm-algorithm "
                  "LowConfidence --dllm-algorithm-config {path}/dllm_config.yaml",
        "LMDeploy": "lmdeploy serve api_server {path} --dllm-block-length {block} --dllm-unmasking-strategy "
                    "low_confidence_dynamic",
        "JetEngine": "", "Diffulex": ""}, "sdar", "SDAR"),
    "fast_dllm_v2": Layout(BLOCKS | {"family": ("qwen2",), "alignment": ("shifted",)}, {"Diffulex": ""},
                           "Fast_dLLM_Qwen", "Fast_dLLM_Qwen", "bd_size"),
    "stable_diffcoder": Layout(BLOCKS | {"family": ("llama",), "alignment": ("same_position",)}, {"Diffulex": ""},
                               "llama", "StableDiffcoder"),
    "llada": Layout({"family": ("llama",), "alignment": ("same_position",), "rule": ("bidirectional",),
                     "biases": ("none",), "rope": ("none",), "heads": ("the width together",)},
                    {"JetEngine": "", "dInfer": ""}, "llada", "LLaDA", own_code=False, renames=LLADA_NAMES),
}


def default_layout(bundle: Bundle) -> str:
    """Our own for a diffusion model, and the family's class for an autoregressive one."""
    return "dlm" if bundle.spec.is_diffusion else "ar"


def misfit(bundle: Bundle, layout: Layout) -> str | None:
    """Why the layout cannot express the model, or None if it can."""
    config, spec = bundle.config, bundle.spec
    if config.mask_adapters is not None and layout is not LAYOUTS["ar"]:
        return "it has adapters that act on mask tokens only"
    biases = "some" if config.qkv_bias or config.output_bias or config.mlp_bias else "none"
    known = {"family": config.family, "alignment": spec.alignment, "rule": spec.rule, "visibility": spec.visibility,
             "biases": biases, "rope": config.rope.scaling if config.rope else "none",
             "heads": "the width together" if config.heads * config.head_dim == config.width else "another width"}
    words = {"rope": "scaling of rope", "visibility": "visibility of finished text", "heads": "size of its heads"}
    for name, values in layout.needs.items():
        if known[name] not in values:
            return f"the model's {words.get(name, name)} is {known[name]} and the layout has {' or '.join(values)}"
    return None


def fitting(bundle: Bundle) -> list[str]:
    """The layouts that can express the model, those of engines first."""
    names = [*(name for name in LAYOUTS if name not in ("dlm", "ar")), "ar", "dlm"]
    return [name for name in names if misfit(bundle, LAYOUTS[name]) is None]


def check_fit(bundle: Bundle, name: str) -> None:
    """Raises `UserError` for a layout that cannot express the model, naming those that can."""
    reason = misfit(bundle, LAYOUTS[name])
    if reason is not None:
        raise UserError(f"the layout {name} cannot express this model: {reason}; choose {', '.join(fitting(bundle))}")


def engines(bundle: Bundle, name: str) -> dict[str, str]:
    """The engines that read the model in this layout, each with the command that serves it."""
    found = dict(LAYOUTS[name].engines)
    if name == "sdar" and bundle.spec.mask_token_id != FIXED_MASK:
        found = {engine: command for engine, command in found.items() if engine not in ("SGLang", "LMDeploy")}
    return {engine: command.replace("{block}", str(bundle.spec.block_size)) for engine, command in found.items()}


def autoregressive(bundle: Bundle) -> Bundle:
    """The model as its finished text sees itself: left to right."""
    config = dataclasses.replace(bundle.config, mask_adapters=None)
    return dataclasses.replace(bundle, config=config, spec=bundle.spec.as_autoregressive())


def layout_fields(bundle: Bundle, name: str, own: Fields) -> Fields:
    """The `config.json` of a layout, from that of our own layout."""
    layout = LAYOUTS[name]
    if name == "llada":
        return llada_fields(bundle, own)
    module = f"modeling_{name}"
    classes = {"AutoConfig": f"{module}.{layout.name}Config"}
    classes |= dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM"),
                             f"{module}.{layout.name}ForCausalLM")
    rope = own["rope_parameters"]
    # Engines that were written for transformers 4 read these and take a default in silence where they are missing.
    old = {"rope_theta": rope["rope_theta"], "sliding_window": None, "use_sliding_window": False}
    if rope["rope_type"] != "default":  # transformers 5 takes a null here for the rope itself
        old["rope_scaling"] = rope
    return own | old | {"model_type": layout.model_type, "architectures": [f"{layout.name}ForCausalLM"],
                        "auto_map": classes, layout.block_field: bundle.spec.block_size,
                        "pad_token_id": bundle.spec.eos_token_id}


def llada_fields(bundle: Bundle, own: Fields) -> Fields:
    """LLaDA's `config.json`, in the words of OLMo; the inverse of `published.llada`."""
    c, spec = bundle.config, bundle.spec
    assert c.rope is not None
    return {
        "model_type": "llada", "architectures": ["LLaDAModelLM"], "dtype": own["dtype"], "vocab_size": c.vocab_size,
        "embedding_size": c.vocab_size, "d_model": c.width, "n_layers": c.depth, "n_heads": c.heads,
        "n_kv_heads": c.kv_heads, "mlp_hidden_size": c.mlp_width, "max_sequence_length": c.max_length,
        "rms_norm_eps": c.norm_eps, "rope_theta": c.rope.theta, "weight_tying": c.tied_head, "block_type": "llama",
        "layer_norm_type": "rms", "activation_type": "silu", "rope": True, "alibi": False, "include_bias": False,
        "include_qkv_bias": False, "mask_token_id": spec.mask_token_id, "bos_token_id": spec.bos_token_id,
        "eos_token_id": spec.eos_token_id, "pad_token_id": spec.eos_token_id, "recipe": spec.recipe,
        "base_model": spec.base_model, "base_revision": spec.base_revision}


def write_companions(directory: Path, bundle: Bundle, name: str) -> None:
    """What engines read beside weights and `config.json`."""
    layout, spec = LAYOUTS[name], bundle.spec
    ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": spec.eos_token_id, "pad_token_id": spec.eos_token_id}
    write_json(directory / "generation_config.json", {key: value for key, value in ids.items() if value is not None})
    if layout.own_code:
        code = CODE.format(name=layout.name, model_type=layout.model_type)
        (directory / f"modeling_{name}.py").write_text(code, encoding="utf-8")
    if spec.block_size is not None:
        (directory / "dllm_config.yaml").write_text(f"block_size: {spec.block_size}\nthreshold: 0.9\n")
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.exists():
        special = {key: value for key, value in read_json(tokenizer).items()
                   if key in ("bos_token", "eos_token", "pad_token", "unk_token", "mask_token") and value is not None}
        write_json(directory / "special_tokens_map.json", special)


def write_json(path: Path, fields: Fields) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
