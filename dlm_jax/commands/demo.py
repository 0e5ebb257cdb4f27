"""`dlm demo`: watch an autoregressive model become a diffusion language model. It needs one CPU and no network."""

import argparse
import dataclasses
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.commands.arguments import Arguments
from dlm_jax.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from dlm_jax.config import Config
    from dlm_jax.language_model import LanguageModel
    from dlm_jax.training.run import Outcome

CONFIG = "tiny"

# What fills the hole must fit the condition before it and the lines after it.
CODE = '''    def write(self, data):
        if not isinstance(data,[MASK:10]
        self.buffer.append(data)
        return len(data)
'''
HINT = r"if __name__[MASK:5]\n    main()\n"  # the model writes == '__main__':


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm demo`."""
    parser.add_argument("--out", required=True, help="new directory for the runs and the export")


def run(a: Arguments) -> dict[str, Any]:
    """Runs the demo; returns its figures."""
    return demo(Path(a.out))


def demo(out: Path) -> dict[str, Any]:
    """Adapts the bundled base, trains the same model from scratch for comparison, fills a hole in code, exports.

    Writes everything under the new directory `out`: the runs `adapted` and `scratch`, and `export`. Returns the NELBO
    of the validation text in nats per token (before, after and from scratch), the seconds it all took, and where the
    export is.
    """
    from rich.console import Console

    from dlm_jax.adapt import adapt
    from dlm_jax.config import load_config
    from dlm_jax.language_model import load
    from dlm_jax.sampling.render import play
    if out.exists():
        raise UserError(f"{out} already exists; name a new directory or remove it")
    start = time.perf_counter()
    console = Console(stderr=True)
    config = load_config(CONFIG)
    console.rule("1  The bundled autoregressive model becomes a diffusion model")
    adapted = adapt(config, out / "adapted")
    console.rule("2  For comparison: the same model from random weights, with as many steps")
    scratch = adapt(from_scratch(config), out / "scratch")
    console.rule("3  It fills a hole in real code, all positions at once")
    lm = load(out / "adapted")
    sample = lm.infill(CODE)
    play(lm.text_tokenizer().pieces(sample.tokens), sample.commit_step, console)
    console.rule("4  It goes back to PyTorch")
    lm.export(out / "export")
    console.print(check_export(lm, out / "export"), soft_wrap=True)
    console.print(nelbo_table(adapted, scratch))
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} seconds. Now try:", soft_wrap=True)
    console.print(f"  printf '{HINT}' | dlm infill {out / 'adapted'} - --watch", markup=False, soft_wrap=True)
    return {"nelbo_before": adapted.nelbo_before, "nelbo_after": adapted.nelbo_after,
            "nelbo_scratch": scratch.nelbo_after, "seconds": seconds, "export": str(out / "export")}


def from_scratch(config: "Config") -> "Config":
    """The same run from random weights."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, init="scratch"))


def nelbo_table(adapted: "Outcome", scratch: "Outcome") -> "Table":
    """The three NELBOs side by side."""
    from rich.table import Table
    result = Table(title="NELBO of held-out code, nats per token")
    for column in ("before adaptation", f"adapted, {adapted.steps} steps", f"from scratch, {scratch.steps} steps"):
        result.add_column(column, justify="right")
    result.add_row(*(f"{x:.3f}" for x in (adapted.nelbo_before, adapted.nelbo_after, scratch.nelbo_after)))
    return result


def check_export(lm: "LanguageModel", directory: Path) -> str:
    """Loads the export in PyTorch, where that is installed, and reports how far its logits are from ours."""
    if importlib.util.find_spec("torch") is None:
        return f"written to {directory}; install torch to load it with transformers.AutoModel"
    import numpy as np
    import torch
    from transformers import AutoModel, utils
    utils.logging.disable_progress_bar()
    model = AutoModel.from_pretrained(str(directory), trust_remote_code=True)
    tokens = np.arange(2, 66)[None]
    with torch.no_grad():
        torch_logits = model(torch.tensor(tokens)).logits.numpy()
    difference = float(np.abs(torch_logits - np.asarray(lm.logits(tokens))).max())
    return f"written to {directory}; AutoModel.from_pretrained gives the same logits, to {difference:.1e}"
