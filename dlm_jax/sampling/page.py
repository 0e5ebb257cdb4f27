"""A self-contained HTML page that shows a text as it is denoised, with a slider; colored by confidence or by step."""

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from dlm_jax.sampling.history import Moment
from dlm_jax.sampling.render import printable

ASSETS = Path(__file__).parent.parent / "assets"

Change = list[int | float | str | None]  # [position, text or None where masked, commit step, confidence]


def write_page(moments: Sequence[Moment], file: str | Path, title: str, facts: Mapping[str, object]) -> None:
    """Writes the page. facts: names and values shown below the text, such as the NFE."""
    data = json.dumps({"final": [printable(piece or "") for piece in moments[-1].pieces], "frames": changes(moments)},
                      ensure_ascii=False, separators=(",", ":"))
    shown = "".join(f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(str(value))}</dd></div>"
                    for name, value in facts.items())
    page = template("page.html").replace("{{title}}", html.escape(title)).replace("{{facts}}", shown)
    page = page.replace("{{data}}", data.replace("<", "\\u003c"))
    Path(file).write_text(page, encoding="utf-8")


def template(name: str) -> str:
    """A page of `assets` with the style and the script that all pages share."""
    page = (ASSETS / name).read_text(encoding="utf-8")
    for kind in ("css", "js"):
        page = page.replace(f"{{{{{kind}}}}}", (ASSETS / f"denoising.{kind}").read_text(encoding="utf-8"))
    return page


def changes(moments: Sequence[Moment]) -> list[list[Change]]:
    """What each moment changes relative to the one before it; the first one sets every position."""
    previous: list[Change] = [[]] * len(moments[0].pieces)
    frames = []
    for moment in moments:
        current: list[Change] = [[piece if piece is None else printable(piece), commit_step, p]
                                 for piece, commit_step, p in zip(moment.pieces, moment.commit_step, moment.confidence)]
        frames.append([[position, *new] for position, (new, old) in enumerate(zip(current, previous)) if new != old])
        previous = current
    return frames
