"""Drawings of a sample as it is denoised: its moments, the GIF, the page, the live view."""

import dataclasses
import io
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dlm_jax.sampling.history import Moment, Recorder, moment_at
from dlm_jax.sampling.page import write_page
from dlm_jax.sampling.picture import RACE_FRAMES, layout, write_gif, write_race
from dlm_jax.sampling.screen import live


class Letters:
    """A tokenizer with one letter per id."""

    def pieces(self, ids):
        return [chr(97 + i) if i < 26 else " <&\n"[i - 26] for i in ids]


@pytest.fixture(scope="module")
def recorded(toy):
    """A recorder that has watched a sample with revisions, and the sample."""
    recorder = Recorder()
    sample = toy("bidirectional", "same_position").continued([[1, 2, 3]], 14, callback=recorder,
                                                             unmasking="threshold:0.2+remask:0.1+edit:0.1")[0]
    return recorder, sample


def test_moments_go_from_the_prompt_to_the_text_and_each_changes_something(recorded):
    recorder, sample = recorded
    moments = recorder.moments(Letters(), sample.tokens)
    assert [piece is None for piece in moments[0].pieces] == [False] * 3 + [True] * 14
    assert moments[-1].pieces == Letters().pieces(sample.tokens)
    assert moments[-1].commit_step == sample.commit_step
    np.testing.assert_allclose(moments[-1].confidence, sample.confidence, atol=1e-4)
    assert all(a != b for a, b in zip(moments, moments[1:])) and len(moments) == len(recorder.traces) + 1


def test_a_gif_has_a_frame_for_each_moment(recorded, tmp_path):
    recorder, sample = recorded
    moments = recorder.moments(Letters(), sample.tokens)
    write_gif(moments, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.format == "GIF" and gif.n_frames == len(moments) and gif.info["loop"] == 0
        first = np.asarray(gif.convert("L"))
        gif.seek(gif.n_frames - 1)
        assert (np.asarray(gif.convert("L")) < 100).sum() > (first < 100).sum()  # letters where bars were


def test_in_a_race_each_text_is_written_at_its_own_speed(recorded, tmp_path):
    _, sample = recorded
    pieces = Letters().pieces(sample.tokens)
    slow, fast = (dataclasses.replace(sample, cost=dataclasses.replace(sample.cost, seconds=s)) for s in (0.4, 0.1))
    assert moment_at(pieces, slow, 0.1).step < moment_at(pieces, fast, 0.1).step == max(sample.commit_step)
    assert moment_at(pieces, slow, 0.0).commit_step == [0] * 17
    assert moment_at(pieces, slow, 0.0).pieces[3:] == [None] * 14 and moment_at(pieces, slow, 0.4).pieces == pieces
    write_race({"slow": (pieces, slow), "fast": (pieces, fast)}, tmp_path / "race.gif")
    with Image.open(tmp_path / "race.gif") as gif:
        assert gif.n_frames == RACE_FRAMES
        gif.seek(RACE_FRAMES // 2)
        above, below = np.split(np.asarray(gif.convert("L")), 2)
        assert (below < 100).sum() > (above < 100).sum()


def test_the_columns_of_code_in_a_gif_are_aligned():
    [first], _, [second], _, [third] = layout(["if illi", "\n", "    WWW", "\n", "x = 111"])
    assert first[2] == second[2] == third[2] and first[0] == second[0] == third[0]
    assert layout(["a" * 79, "bc"])[1][0][1] > layout(["a" * 79, "b"])[1][0][1]  # lines have 80 columns


@pytest.fixture
def page(recorded, tmp_path):
    recorder, sample = recorded
    moments = recorder.moments(Letters(), sample.tokens)
    moments = [Moment([None if piece is None else "</script>" + piece if i == 4 else piece
                       for i, piece in enumerate(m.pieces)], m.commit_step, m.confidence) for m in moments]
    write_page(moments, tmp_path / "a.html", "a <title>", {"new tokens": 14})
    return tmp_path / "a.html", moments


def test_a_page_is_self_contained_and_holds_every_change(page):
    file, moments = page
    text = file.read_text()
    assert not re.search(r"(src|href)=|@import|url\(", text) and text.count("</script>") == 1
    data = json.loads(re.search(r"const data = (.*);", text).group(1))
    cells = {}
    for frame, moment in zip(data["frames"], moments, strict=True):
        cells |= {position: cell for position, *cell in frame}
        shown = [piece for piece, _, _ in (cells[i] for i in range(len(moment.pieces)))]
        assert shown == [None if piece is None else piece.replace("\t", "    ") for piece in moment.pieces]
    assert "a &lt;title&gt;" in text


@pytest.mark.parametrize("step", (0, 2, "last"))
def test_a_browser_shows_the_moment_that_the_slider_is_at(page, step, tmp_path):
    file, moments = page
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("needs Chromium")
    at = len(moments) - 1 if step == "last" else step
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               "--virtual-time-budget=2000", "--dump-dom", f"file://{file}#step={at}&color=commit_step"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    spans = re.findall(r'<span ([^>]*title=[^>]*)>', dom)
    masked = ['class="masked"' in span for span in spans]
    assert masked == [piece is None for piece in moments[at].pieces]
    written = [bool(step) for step in moments[at].commit_step]
    assert ["background-color" in span for span in spans] == written
    all_ = sum(moments[-1].commit_step[i] > 0 for i in range(len(masked)))
    assert f"{sum(written)} of {all_} tokens" in dom and 'aria-pressed="true">Step' in dom


def test_the_live_view_shows_every_step_in_turn_and_ends_with_the_text(recorded):
    recorder, sample = recorded
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=60, color_system=None, _environ={})
    with live(Letters().pieces, console) as screen:
        for trace in recorder.traces:
            screen(trace)
    written = file.getvalue()
    last = re.findall(r"(\d+) of 14 tokens, NFE (\d+)", written)
    assert [int(nfe) for _, nfe in last][-1] == sample.nfe and last[-1][0] == "14"
    assert written.count("NFE") >= len(recorder.traces) and "░░░" in written
