"""`dlm export`: a model as a Hugging Face directory for PyTorch, or a run's adapters as a PEFT directory."""

import argparse
from pathlib import Path
from typing import Any

from dlm_jax.commands.arguments import MODEL_HELP, Arguments, unicode_text
from dlm_jax.errors import UserError
from dlm_jax.files import check_new, new_directory


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm export`."""
    parser.add_argument("model", help=MODEL_HELP)
    parser.add_argument("--out", required=True, help="new directory")
    parser.add_argument("--license", type=unicode_text, metavar="NAME",
                        help="for the model card: the license, by the hub's name for it, such as apache-2.0")
    parser.add_argument("--datasets", type=unicode_text, nargs="+", default=[], metavar="NAME",
                        help="for the model card: what the model was trained on")
    parser.add_argument("--layout", metavar="NAME", type=layout_name,
                        help="the names by which an inference engine reads the model: dlm (our own, the default), ar "
                             "(the plain class, of models that are or contain an autoregressive one), sdar, "
                             "fast_dllm_v2, stable_diffcoder, llada; auto: the first of an engine that fits; gguf: "
                             "a file for llama.cpp")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "q8_0"],
                      help="dtype of the weights (default: as held, which is float32 after training); float16 (its "
                           "default) and q8_0, eight bits, are for gguf")
    what.add_argument("--adapter", action="store_true", help="export only the adapters of a LoRA run, for PEFT")


def layout_name(text: str) -> str:
    """An argument type: the name of a layout, or auto."""
    from dlm_jax.convert.layouts import LAYOUTS
    if text not in (*LAYOUTS, "auto", "gguf"):
        raise argparse.ArgumentTypeError(f"'{text}' is not a layout; choose auto, gguf, {', '.join(LAYOUTS)}")
    return text


def run(a: Arguments) -> dict[str, Any]:
    """Exports; returns where to."""
    check_new(a.out)
    if a.adapter and (a.license or a.datasets or a.layout):
        raise UserError("--license, --datasets and --layout are for a whole model; leave them out with --adapter")
    if a.adapter:
        export_adapter(Path(a.model), Path(a.out))
        return {"out": str(a.out)}
    from dlm_jax.convert.layouts import LAYOUTS, default_layout, engines, fitting
    from dlm_jax.language_model import load
    from dlm_jax.models.bundle import Bundle
    lm = load(a.model)
    bundle = Bundle(lm.config, lm.params, lm.spec)
    layout = fitting(bundle)[0] if a.layout == "auto" else a.layout or default_layout(bundle)
    scores = {} if layout == "ar" else scores_of(Path(a.model))  # the NELBO is that of denoising
    lm.export(a.out, a.dtype, layout, scores=scores, license=a.license, datasets=a.datasets)
    served = engines(bundle, layout) if layout in LAYOUTS else ["llama.cpp"]
    result = {"out": str(a.out), "layout": layout, "engines": ", ".join(served) or None}
    if layout == "ar" and lm.spec.is_diffusion:
        result["note"] = ("left to right only; --layout dlm keeps the denoising" if lm.config.mask_adapters is None else
                          "left to right only; no layout has the adapters of mask tokens, which denoise")
    return result


def scores_of(model: Path) -> dict[str, float]:
    """What the model card says was measured: the validation NELBO, if `model` is the work directory of a run."""
    from dlm_jax.runs.read import validation_nelbo
    nelbo = validation_nelbo(model)
    return {} if nelbo is None else {"validation NELBO, nats per token": nelbo}


def export_adapter(workdir: Path, out: Path) -> None:
    """Writes the adapters of a run, and the modules that were trained in full beside them, to the new directory `out`.

    Raises `UserError` where `workdir` is not that of a run with adapters.
    """
    from dlm_jax.convert.model_card import adapter_card
    from dlm_jax.convert.origin import read_origin
    from dlm_jax.convert.peft import write_peft
    from dlm_jax.loading import ADAPTED_BASE
    if not (workdir / ADAPTED_BASE).is_dir():
        raise UserError(f"{workdir} is not the work directory of a run with lora.rank above 0; leave out --adapter")
    from dlm_jax.runs.read import read_trained
    bundle, lora = read_trained(workdir)
    if lora.gated:
        raise UserError("PEFT has no adapters that act on mask tokens only; leave out --adapter and export the base by "
                        "--layout ar, or keep the run")
    base = read_origin(workdir / ADAPTED_BASE)
    with new_directory(out) as partial:
        write_peft(partial, bundle.params, bundle.config, lora, base)
        (partial / "README.md").write_text(adapter_card(bundle, lora, base), encoding="utf-8")
