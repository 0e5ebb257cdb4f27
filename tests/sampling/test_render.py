"""The replay: what is hidden, what is bright, and that nothing moves."""

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from dlm_jax.sampling.render import caption, frames, play

PIECES = ["", "def", " f", "(a", "):\n", "\t", "", "return", " 日本", "\n\n", " a", " longer", " tail", "."]
COMMIT_STEP = [0, 0, 0, 2, 1, 4, 3, 1, 2, 5, 4, 1, 2, 2]


def bright(frame):
    """What a frame shows bright."""
    return [frame.plain[span.start:span.end] for span in frame.spans if "on green" in str(span.style)]


def test_frames_begin_hidden_and_end_with_the_full_text():
    shown = [frame.plain for frame in frames(PIECES, COMMIT_STEP)]
    assert len(shown) == max(COMMIT_STEP) + 2
    assert shown[-1] == shown[-2] == "".join(PIECES).replace("\t", "    ")
    assert shown[0].startswith("def f") and not set(shown[0][5:]) - set(" \n░〓")


def test_every_committed_piece_is_bright_exactly_once_at_its_step():
    seen = [(step, piece) for step, frame in enumerate(frames(PIECES, COMMIT_STEP)) for piece in bright(frame)]
    committed = [(step, piece.replace("\t", "    ")) for step, piece in zip(COMMIT_STEP, PIECES) if step and piece]
    assert seen == sorted(committed, key=lambda pair: pair[0])
    assert not bright(list(frames(PIECES, COMMIT_STEP))[-1])


@pytest.mark.parametrize("width", (7, 12, 40))
def test_nothing_moves_while_the_text_appears(width):
    console = Console(width=width, file=io.StringIO())
    layouts = {tuple(cell_len(line.plain.rstrip()) for line in frame.wrap(console, width))
               for frame in frames(PIECES, COMMIT_STEP)}
    assert len(layouts) == 1
    assert len({len(caption(COMMIT_STEP, step)) for step in range(6)}) == 1


def test_control_characters_do_not_reach_the_terminal():
    shown = list(frames(["a\x1b[31m", "b\x07\x9b", "c\r\nd"], [0, 1, 1]))[-1].plain
    assert shown == "a�[31mb��c\nd"


def recorded(terminal, commit_step=COMMIT_STEP, pieces=PIECES):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=40, color_system=None, _environ={})
    play(pieces, commit_step, console, 0.05)
    return file.getvalue()


def test_a_terminal_sees_every_frame_and_keeps_the_finished_text():
    written = recorded(True)
    assert all(f"step {step} of 5" in written for step in range(6))
    assert written.rindex("return 日本") > written.rindex("░") and "11 of 11 tokens" in written


def test_elsewhere_the_finished_text_is_printed_once_and_plain():
    assert recorded(False) == "".join(PIECES).replace("\t", "    ") + "\n"
    assert recorded(False, [0], ["[bold]" + "x" * 60]) == "[bold]" + "x" * 60 + "\n"


def test_an_empty_sample_plays():
    assert "step 0 of 0" in recorded(True, [], [])
