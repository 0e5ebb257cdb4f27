"""A GIF of a text as it is denoised, in a monospaced font, since it may be code. Nothing moves: a masked token is a bar
as wide as its text."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from rich.cells import cell_len

from dlm_jax.sampling.history import Moment, moment_at
from dlm_jax.sampling.render import printable
from dlm_jax.sampling.sample import Sample

FONT = Path(__file__).parent.parent / "assets" / "font" / "DejaVuSansMono.ttf"
COLUMNS = 80  # characters per line at most
MIN_COLUMNS = 40  # so that the caption fits
MARGIN, FONT_SIZE, CELL, LINE = 32, 20, 12, 32  # pixels; a character of this size is 12.05 wide
PAPER, BAR, PROMPT, INK = (250, 250, 247), (222, 222, 216), (120, 120, 114), (24, 24, 24)
CONFIDENT, UNCERTAIN = (178, 226, 190), (252, 214, 160)  # behind a token, by the model's confidence
TOTAL_SECONDS, MIN_FRAME_SECONDS, LAST_FRAME_SECONDS = 5.0, 0.05, 2.5
RACE_FRAMES = 48

Box = tuple[int, int, int]  # left, top, width, in pixels


def write_gif(moments: Sequence[Moment], file: str | Path) -> None:
    """Draws one frame per moment, in an endless loop."""
    save([draw(moment, moments[-1].pieces) for moment in moments], file)


def write_race(runs: Mapping[str, tuple[Sequence[str], Sample]], file: str | Path) -> None:
    """Draws samples one below the other, each at the speed at which it was written. runs: name to (pieces, sample)."""
    slowest = max(sample.cost.seconds for _, sample in runs.values())
    frames = []
    for now in np.linspace(0, slowest, RACE_FRAMES):
        frames.append(stack([draw(moment_at(pieces, sample, now), pieces,
                                  f"{name}, {1000 * min(now, sample.cost.seconds):.0f} ms: ")
                             for name, (pieces, sample) in runs.items()]))
    save(frames, file)


def stack(images: Sequence[Image.Image]) -> Image.Image:
    """The images one below the other."""
    whole = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), PAPER)
    for i, image in enumerate(images):
        whole.paste(image, (0, sum(above.height for above in images[:i])))
    return whole


def save(frames: Sequence[Image.Image], file: str | Path) -> None:
    """Writes the frames, the last of which stays for a while."""
    colors = stack([frames[0], frames[-1]]).quantize(64)  # common to all, so that only what changes is stored
    first, *rest = [frame.quantize(palette=colors, dither=Image.Dither.NONE) for frame in frames]
    frame_seconds = max(MIN_FRAME_SECONDS, TOTAL_SECONDS / len(frames))
    milliseconds = [int(1000 * frame_seconds)] * len(rest) + [int(1000 * LAST_FRAME_SECONDS)]
    first.save(file, format="GIF", save_all=True, append_images=rest, duration=milliseconds, loop=0)


def split_lines(piece: str) -> list[str]:
    """The text between line breaks, and each line break as an entry of its own."""
    return [run for line in piece.splitlines(keepends=True)
            for run in ([line[:-1], "\n"] if line.endswith("\n") else [line]) if run]


def layout(pieces: Sequence[str]) -> list[list[Box]]:
    """Where each piece is drawn: one box for each run of `split_lines` that is not a line break."""
    x, y, boxes = 0, 0, []
    for piece in pieces:
        runs: list[Box] = []
        for run in split_lines(piece):
            if run == "\n":
                x, y = 0, y + LINE
                continue
            width = CELL * cell_len(run)
            if x + width > COLUMNS * CELL:
                x, y = 0, y + LINE
            runs.append((MARGIN + x, MARGIN + y, width))
            x += width
        boxes.append(runs)
    return boxes


def draw(moment: Moment, pieces: Sequence[str | None], title: str = "") -> Image.Image:
    """A frame of the text that becomes `pieces`. A token of the last step is outlined, except in the finished text."""
    font = ImageFont.truetype(FONT, FONT_SIZE)
    final = [printable(piece or "") for piece in pieces]
    boxes = layout(final)
    drawn = [box for runs in boxes for box in runs]
    size = (MARGIN + max([MARGIN + MIN_COLUMNS * CELL, *(left + width for left, _, width in drawn)]),
            MARGIN * 2 + LINE + max((top for _, top, _ in drawn), default=0))
    image = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(image)
    unfinished = None in moment.pieces
    for piece, commit_step, p, runs, last in zip(moment.pieces, moment.commit_step, moment.confidence, boxes, final):
        words = [run for run in split_lines(printable(piece or last)) if run != "\n"]
        for (x, y, width), word in zip(runs, words):
            if piece is None:
                pen.rounded_rectangle((x + 1, y + 5, x + max(width - 1, 3), y + LINE - 7), 4, fill=BAR)
                continue
            if commit_step:
                outlined = unfinished and commit_step == moment.step
                tint = tuple(round(a + (b - a) * p) for a, b in zip(UNCERTAIN, CONFIDENT))
                pen.rounded_rectangle((x, y + 2, x + width, y + LINE - 4), 4, fill=tint,
                                      outline=INK if outlined else None)
            pen.text((x, y + 3), word, font=font, fill=INK if commit_step else PROMPT)
    written = sum(step > 0 for step in moment.commit_step)
    total = written + moment.pieces.count(None)
    caption = f"{title}step {moment.step} · {written} of {total} tokens"
    pen.text((MARGIN, size[1] - LINE), caption, font=font, fill=PROMPT)
    return image
