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
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--dtype", choices=["float32", "bfloat16"],
                      help="dtype of the weights (default: as held, which is float32 after training)")
    what.add_argument("--adapter", action="store_true", help="export only the adapters of a LoRA run, for PEFT")


def run(a: Arguments) -> dict[str, Any]:
    """Exports; returns where to."""
    check_new(a.out)
    if a.adapter and (a.license or a.datasets):
        raise UserError("--license and --datasets are for the card of a whole model; leave them out with --adapter")
    if a.adapter:
        export_adapter(Path(a.model), Path(a.out))
    else:
        from dlm_jax.language_model import load
        load(a.model).export(a.out, a.dtype, scores=scores_of(Path(a.model)), license=a.license, datasets=a.datasets)
    return {"out": str(a.out)}


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
    base = read_origin(workdir / ADAPTED_BASE)
    with new_directory(out) as partial:
        write_peft(partial, bundle.params, bundle.config, lora, base)
        (partial / "README.md").write_text(adapter_card(bundle, lora, base), encoding="utf-8")
