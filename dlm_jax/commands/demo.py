"""`dlm demo`: watch an autoregressive model become a diffusion language model. It needs one CPU and no network."""

import argparse
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dlm_jax.commands import demo_records
from dlm_jax.commands.arguments import Arguments
from dlm_jax.errors import UserError

if TYPE_CHECKING:
    from dlm_jax.language_model import LanguageModel
    from dlm_jax.training.run import Outcome

CONFIG = "tiny"

# What fills the hole must fit the condition before it and the lines after it.
CODE = '''    def write(self, data):
        if not isinstance(data,[MASK:10]
        self.buffer.append(data)
        return len(data)
'''
LINE = r"Ada Stone, 41, pilot, Lima, 12\n\n"  # the last line break only ends the pipe
PAGE = "prompt=Ada%20Stone,%2041,%20pilot,%20Lima,%2012%0A&tokens=96&run"  # asks that line
HINT = r"if __name__[MASK:5]\n    main()\n"  # the model writes == '__main__':


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `dlm demo`."""
    parser.add_argument("--out", required=True, help="new directory for the runs and the export")


def run(a: Arguments) -> dict[str, Any]:
    """Runs the demo; returns its figures."""
    return demo(Path(a.out))


def demo(out: Path) -> dict[str, Any]:
    """Adapts the bundled base, fills a hole in code, exports, and writes JSON faster than left to right.

    Writes everything under the new directory `out`: the run `adapted`, `export`, and those of the JSON under `records`.
    Returns the NELBO of the validation text in nats per token (before and after), how the JSON was written, the seconds
    it all took, and where the export is.
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
    console.print(nelbo_line(adapted), soft_wrap=True)
    console.rule("2  It fills a hole in real code, all positions at once")
    lm = load(out / "adapted")
    sample = lm.infill(CODE)
    play(lm.text_tokenizer().pieces(sample.tokens), sample.commit_step, console)
    console.rule("3  It goes back to PyTorch")
    lm.export(out / "export")
    console.print(check_export(lm, out / "export"), soft_wrap=True)
    console.rule("4  On text with structure it writes many tokens at a time")
    records = demo_records.run(out / "records", console)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} seconds. Now try:", soft_wrap=True)
    for text, command in ((HINT, f"dlm infill {out / 'adapted'} - --watch"),
                          (LINE, f"dlm sample {out / 'records' / 'hybrid_shifted'} --prompt - --max-tokens 96 "
                                 f"--unmasking {demo_records.UNMASKING} --watch")):
        console.print(f"  printf '{text}' | {command}", markup=False, soft_wrap=True)
    console.print(f"  dlm serve {out / 'records' / 'hybrid_shifted'} --unmasking {demo_records.UNMASKING}   # and open "
                  f"http://127.0.0.1:8000/#{PAGE}", markup=False, soft_wrap=True)
    return {"nelbo_before": adapted.nelbo_before, "nelbo_after": adapted.nelbo_after, **records, "seconds": seconds,
            "export": str(out / "export")}


def nelbo_line(adapted: "Outcome") -> str:
    """What adaptation did to the NELBO."""
    return (f"NELBO of held-out code: {adapted.nelbo_before:.3f} nats per token before adaptation, "
            f"{adapted.nelbo_after:.3f} after {adapted.steps} steps")


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
