"""A self-contained HTML page of a text coming out of the noise, with a slider; coloured by confidence or by step."""

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dlm_jax.sampling.history import Moment
from dlm_jax.sampling.render import printable

TEMPLATE = Path(__file__).parent.parent / "assets" / "page.html"


def write_page(moments: Sequence[Moment], file: str | Path, title: str, facts: dict[str, Any]) -> None:
    """Writes the page; facts: names and values that stand below the text."""
    data = json.dumps({"final": [printable(piece or "") for piece in moments[-1].pieces], "frames": changes(moments)},
                      ensure_ascii=False, separators=(",", ":"))
    shown = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
                    for name, value in facts.items())
    page = TEMPLATE.read_text(encoding="utf-8")
    page = page.replace("{{title}}", html.escape(title)).replace("{{facts}}", shown)
    page = page.replace("{{data}}", data.replace("<", "\\u003c"))
    Path(file).write_text(page, encoding="utf-8")


def changes(moments: Sequence[Moment]) -> list[list[list[Any]]]:
    """What each moment changes of the one before it: [place, text or None, step, confidence]."""
    before: list[Any] = [()] * len(moments[0].pieces)
    frames = []
    for moment in moments:
        now = [[piece if piece is None else printable(piece), order, p]
               for piece, order, p in zip(moment.pieces, moment.order, moment.confidence)]
        frames.append([[place, *new] for place, (new, old) in enumerate(zip(now, before)) if new != old])
        before = now
    return frames
