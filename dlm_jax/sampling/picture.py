"""A GIF of a text coming out of the noise. Nothing moves: a masked token is a bar as wide as its text."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from dlm_jax.sampling.history import Moment
from dlm_jax.sampling.render import printable

WIDTH, MARGIN, SIZE, LINE = 880, 32, 20, 32  # pixels
PAPER, BAR, GIVEN, INK = (250, 250, 247), (222, 222, 216), (120, 120, 114), (24, 24, 24)
SURE, UNSURE = (178, 226, 190), (252, 214, 160)  # behind a token, by the model's confidence
SECONDS, FASTEST, LAST = 5.0, 0.05, 2.5  # of the whole, the shortest frame, and the last one

Box = tuple[int, int, int]  # left, top, width


def write_gif(moments: Sequence[Moment], file: str | Path) -> None:
    """Draws the moments one after the other, for ever."""
    font = ImageFont.load_default(SIZE)
    final = [printable(piece or "") for piece in moments[-1].pieces]
    boxes = layout(final, font)
    height = MARGIN * 2 + LINE + max((top for runs in boxes for _, top, _ in runs), default=0)
    frames = [draw(moment, boxes, final, font, height) for moment in moments]
    each = max(FASTEST, SECONDS / len(frames))
    times = [int(1000 * each)] * (len(frames) - 1) + [int(1000 * LAST)]
    frames[0].save(file, format="GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def lines(piece: str) -> list[str]:
    """The words of a piece with their spaces, and its line breaks, each by itself."""
    return [part for line in piece.splitlines(keepends=True)
            for part in ([line[:-1], "\n"] if line.endswith("\n") else [line]) if part]


def layout(pieces: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[list[Box]]:
    """Where the runs of each piece stand: one box for each of `lines` that is not a line break."""
    x, y, boxes = 0, 0, []
    for piece in pieces:
        runs: list[Box] = []
        for part in lines(piece):
            if part == "\n":
                x, y = 0, y + LINE
                continue
            width = round(font.getlength(part))
            if x + width > WIDTH - 2 * MARGIN:
                x, y = 0, y + LINE
            runs.append((MARGIN + x, MARGIN + y, width))
            x += width
        boxes.append(runs)
    return boxes


def draw(moment: Moment, boxes: Sequence[Sequence[Box]], final: Sequence[str],
         font: ImageFont.FreeTypeFont | ImageFont.ImageFont, height: int) -> Image.Image:
    """One frame."""
    image = Image.new("RGB", (WIDTH, height), PAPER)
    pen = ImageDraw.Draw(image)
    for piece, order, p, runs, last in zip(moment.pieces, moment.order, moment.confidence, boxes, final):
        parts = [part for part in lines(printable(piece or last)) if part != "\n"]
        for (x, y, width), part in zip(runs, parts):
            if piece is None:
                pen.rounded_rectangle((x + 1, y + 5, x + max(width - 1, 3), y + LINE - 7), 4, fill=BAR)
                continue
            if order:
                fresh = order == moment.step and None in moment.pieces
                tint = tuple(round(a + (b - a) * p) for a, b in zip(UNSURE, SURE))
                pen.rounded_rectangle((x, y + 2, x + width, y + LINE - 4), 4, fill=tint,
                                      outline=INK if fresh else None)
            pen.text((x, y + 3), part, font=font, fill=INK if order else GIVEN)
    done = sum(step > 0 for step in moment.order)
    total = done + moment.pieces.count(None)
    pen.text((MARGIN, height - LINE), f"step {moment.step} · {done} of {total} tokens", font=font, fill=GIVEN)
    return image.quantize(64)
