"""The timeline of a layer: what the core does and what it waits for, one after the other, and nothing twice."""

import re

import pytest

from dlm_jax.aot.program import Event, Loop
from dlm_jax.aot.report import aot
from dlm_jax.aot.timeline import Pace, layers, merged, page, play, rows_of
from dlm_jax.commands.main import main
from dlm_jax.config import load_config
from dlm_jax.errors import UserError

PACE = Pace(clock=1e3, bandwidth=1e3, kernels={"attention_forward": 0.5})
GATHER = Event("all-gather", "closed_call/gather", size=200)
STARTED = Event("all-reduce", "sum", part="start", transfer="sum")
DONE = Event("all-reduce", "sum", size=1000, part="done", transfer="sum")
PRODUCT, COPY = Event("products", "a/closed_call/dot", 100), Event("copies", "", 30)
KERNEL = Event("kernels", "attention_forward")


def bars(found):
    return [(bar.kind, bar.begin, bar.seconds) for bar in found]


def test_the_core_waits_for_all_of_a_collective_that_stands_in_line():
    trip = play([GATHER, PRODUCT], PACE)
    assert bars(trip.core) == [("waiting", 0.0, 0.2), ("products", 0.2, 0.1)]
    assert bars(trip.links) == [("collectives", 0.0, 0.2)] and trip.seconds == pytest.approx(0.3)


def test_a_collective_travels_behind_work_and_the_core_waits_for_the_rest():
    trip = play([STARTED, PRODUCT, KERNEL, DONE, COPY], PACE)
    assert bars(trip.links) == [("collectives", 0.0, 1.0)]
    assert [kind for kind, *_ in bars(trip.core)] == ["products", "kernels", "waiting", "copies"]
    assert trip.core[2].seconds == pytest.approx(1.0 - 0.1 - 0.5) and trip.seconds == pytest.approx(1.03)
    hidden = play([STARTED, *[PRODUCT] * 12, DONE], PACE)
    assert all(bar.kind == "products" for bar in hidden.core) and hidden.seconds == pytest.approx(1.2)


def test_the_bars_of_the_core_fill_the_trip_also_when_short_ones_are_merged():
    short = Event("other", "x", 1)
    trip = play([GATHER, *[short] * 3, PRODUCT, short, KERNEL, COPY], PACE)
    for shown in (trip.core, merged(trip.core, trip.seconds)):
        ends = [bar.begin + bar.seconds for bar in shown]
        assert [bar.begin for bar in shown] == pytest.approx([0, *ends[:-1]])
        assert ends[-1] == pytest.approx(trip.seconds)
    assert len(merged(trip.core, trip.seconds)) == len(trip.core) - 2


def test_collectives_that_travel_together_are_drawn_in_rows_of_their_own():
    other = Event("all-reduce", "b", size=10, part="done", transfer="b")
    trip = play([STARTED, Event("all-reduce", "b", part="start", transfer="b"), PRODUCT, other, DONE, GATHER], PACE)
    assert [len(row) for row in rows_of(trip.links)] == [2, 1]


def test_layers_are_the_innermost_loops_with_a_kernel_and_run_as_often_as_all_around_them():
    forward, backward = Loop(5, (KERNEL, PRODUCT)), Loop(5, (PRODUCT, Event("kernels", "attention_backward")))
    program = (COPY, Loop(3, (forward, Loop(2, (PRODUCT,)), backward)), Loop(4, (COPY,)))
    assert list(layers(program)) == [(15, list(forward.body)), (15, list(backward.body))]


def test_the_page_is_whole_and_shows_names_as_text():
    program = (Loop(4, (GATHER, Event("products", "<b>&dot", 50), KERNEL)),)
    text = page("<i>model</i>", "a step & more", program, PACE)
    assert "<b>" not in text and "<i>model" not in text and "&lt;b&gt;&amp;dot" in text
    assert "A layer, forward: 750,000 µs, 4 times a step" in text
    assert not re.search(r"(src|href)=|https?://|<script", text)


def test_a_timeline_that_cannot_be_drawn_is_refused_before_it_compiles(tiny_config, tiny_run, tmp_path, capsys):
    pytest.importorskip("libtpu")
    with pytest.raises(UserError, match="name a file in a directory that exists"):
        aot(load_config(tiny_config, tiny_run), "v5e:2x2", timeline=tmp_path / "none" / "page.html")
    overrides = [f"--config.{x}" for x in tiny_run]
    assert main(["aot", "--config", str(tiny_config), "--topology", "v5e:2x2", "--search", "--timeline", "x.html",
                 *overrides]) == 2
    assert "--timeline draws one program" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
def test_the_layers_of_a_compiled_step_are_drawn_and_take_less_than_the_step(tiny_config, tiny_run, tmp_path):
    pytest.importorskip("libtpu")
    run = [*tiny_run, "data.seq_length=256", "train.global_batch_size=8", "train.grad_accum_steps=1",
           "model.remat=full"]
    report = aot(load_config(tiny_config, run), "v5e:2x2", timeline=tmp_path / "page.html")
    found = re.findall(r"A layer, (\w+): ([\d,]+) µs, (\d+) times", (tmp_path / "page.html").read_text())
    assert [direction for direction, *_ in found] == ["forward", "backward"]
    seconds = sum(float(each.replace(",", "")) * int(times) / 1e6 for _, each, times in found)
    assert 0 < seconds < report.seconds_step * 1.05
