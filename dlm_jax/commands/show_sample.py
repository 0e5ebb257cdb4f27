"""How `dlm sample` and `dlm infill` show what they wrote: as text, live, as a GIF, or as a page."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

from rich.console import Console

from dlm_jax.commands.arguments import Arguments
from dlm_jax.language_model import LanguageModel
from dlm_jax.sampling.history import Recorder
from dlm_jax.sampling.page import write_page
from dlm_jax.sampling.picture import write_gif
from dlm_jax.sampling.render import frame
from dlm_jax.sampling.sample import Sample
from dlm_jax.sampling.screen import live
from dlm_jax.sampling.settings import Settings


def settings_of(a: Arguments) -> dict[str, Any]:
    """The fields of `Settings` among the arguments."""
    return {field.name: getattr(a, field.name) for field in dataclasses.fields(Settings)}


@contextlib.contextmanager
def recording(lm: LanguageModel, a: Arguments) -> Iterator[Recorder | None]:
    """Yields a recorder of the denoising steps where they are to be drawn, else None. A terminal shows them live."""
    if not (a.watch or a.gif or a.html):
        yield None
        return
    console = Console(stderr=True)
    with contextlib.ExitStack() as stack:
        screen = a.watch and console.is_terminal
        yield Recorder(stack.enter_context(live(lm.text_tokenizer().pieces, console)) if screen else None)


def show_sample(lm: LanguageModel, sample: Sample, recorder: Recorder | None, a: Arguments) -> dict[str, Any]:
    """Draws what was asked for, prints the text, and returns the fields of --json."""
    facts = {"new_tokens": sample.new_tokens, "nfe": sample.nfe,
             "tokens_per_forward": round(sample.tokens_per_forward, 3)}
    moments = recorder.moments(lm.text_tokenizer(), sample.tokens) if recorder else []
    if a.watch:
        console = Console(stderr=True)
        if not console.is_terminal:  # nothing was shown live, so the finished text is
            pieces = [piece or "" for piece in moments[-1].pieces]
            console.print(frame(pieces, sample.commit_step, max(sample.commit_step) + 1), soft_wrap=True)
    if a.gif:
        write_gif(moments, a.gif)
    if a.html:
        labels = {name.replace("_", " "): value for name, value in facts.items()}
        write_page(moments, a.html, f"dlm {a.command} {a.model}", {**labels, "unmasking": a.unmasking})
    if not a.json:
        print(sample.text)
    return {"text": sample.text, "tokens": sample.tokens, **facts, "seconds": sample.cost.seconds,
            "tokens_per_second": sample.cost.tokens_per_second, "peak_bytes": sample.cost.peak_bytes}
