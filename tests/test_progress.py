import io
import math

import pytest
from rich.console import Console

from moetrain.progress import (
    LiveProgress,
    PlainProgress,
    describe,
    evenly_spaced,
    load_bars,
    load_table,
    progress,
)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def layer(load, drop_rate=0.0):
    mean = sum(load) / len(load)
    return {"load": load, "drop_rate": drop_rate, "max_vio": max(load) / mean - 1}


TRAIN = {
    "step": 20,
    "loss": 3.21449,
    "drop_rate": 0.0134,
    "tokens_per_s": 12345.6,
    "mfu": None,
    "bad_steps": 0,
    "spikes": 0,
    "step_time_s": 20.5,
    "layers": [layer([4, 4, 4, 4]), layer([16, 0, 0, 0], 0.5)],
}
EVAL = {"step": 20, "eval_loss": 3.1, "eval_nats_per_byte": 1.05, "eval_drop_rate": 0.0}


def test_plain_lines():
    out = io.StringIO()
    with progress(200, True, Console(file=out, width=20)) as view:
        view.note("resumed from step 10 [dim]")
        view.update(TRAIN)
        view.update(EVAL)
    assert out.getvalue().splitlines() == [
        "resumed from step 10 [dim]",
        "step 20/200  loss 3.2145  drop 1.3 %  12.3k tokens/s  eta 1:01:30",
        "step 20/200  eval loss 3.1000  1.0500 nats/byte  eval drop 0.0 %",
    ]
    assert out.getvalue().isascii()


def test_plain_lines_are_there_as_they_come(tmp_path):
    with (tmp_path / "log").open("w") as file:
        PlainProgress(10, True, Console(file=file)).note("first")
        assert (tmp_path / "log").read_text() == "first\n"


def test_a_dense_line_speaks_of_no_drops_and_a_known_device_of_mfu():
    text = describe(TRAIN | {"layers": [], "mfu": 0.413, "tokens_per_s": 2.5e6}, 200, False)
    assert text == ["step 20/200", "loss 3.2145", "2.5M tokens/s", "mfu 41.3 %", "eta 1:01:30"]
    assert describe(EVAL, 200, False) == ["step 20/200", "eval loss 3.1000", "1.0500 nats/byte"]


def test_a_line_counts_the_steps_skipped_so_far():
    text = describe(TRAIN | {"bad_steps": 2, "spikes": 3}, 200, True)
    assert text[2:5] == ["drop 1.3 %", "2 skipped", "3 spikes"]


@pytest.mark.parametrize("loss", [math.nan, None])
def test_a_loss_that_is_no_number(loss):
    assert "loss nan" in describe(TRAIN | {"loss": loss}, 200, True)


@pytest.mark.parametrize(
    ("file", "settings", "kind"),
    [
        (Terminal(), {}, LiveProgress),
        (Terminal(), {"_environ": {"TERM": "dumb"}}, PlainProgress),
        (io.StringIO(), {"_environ": {"FORCE_COLOR": "1"}}, PlainProgress),
        (io.TextIOWrapper(io.BytesIO(), encoding="ascii"), {}, PlainProgress),
    ],
)
def test_the_view_suits_the_output(file, settings, kind):
    settings = {"_environ": {"TERM": "xterm"}} | settings
    assert type(progress(10, True, Console(file=file, **settings))) is kind


def live_output(lines, width=100, height=30):
    out = Terminal()
    console = Console(
        file=out, width=width, height=height, color_system=None, _environ={"TERM": "xterm"}
    )
    with progress(200, True, console) as view:
        for line in lines:
            view.update(line)
        view.note("a note [bold]")
    return out.getvalue()


def test_the_live_view_shows_numbers_bar_and_load():
    text = live_output([TRAIN, EVAL])
    last = text[text.rindex("step 20/200  loss") :]
    assert "loss 3.2145" in last
    assert "━━" in last
    assert "eval loss 3.1000" in last
    assert "▄▄▄▄" in last
    assert "█▁▁▁" in last
    assert "50.0 %     4.00x" in last
    assert "a note [bold]" in text


def test_the_live_view_before_the_first_line_and_of_a_dense_run():
    assert "step 0/200" in live_output([])
    assert "MoE layer" not in live_output([TRAIN | {"layers": []}])


def test_the_live_view_fits_a_small_terminal():
    many = TRAIN | {"layers": [layer([1, 2] * 64)] * 32}
    console = Console(file=io.StringIO(), width=60, height=10)
    view = LiveProgress(200, True, console)
    view.update(many)
    lines = console.render_lines(view._render(), console.options)
    assert len(lines) <= 10
    rows = load_table(many["layers"], width=60, max_rows=4)
    assert list(rows.columns[0].cells) == ["0", "10", "21", "31"]
    assert all(len(str(cell)) <= 60 - 28 for cell in rows.columns[3].cells)


def test_bars_show_load_over_the_mean():
    assert load_bars([0, 50, 100, 150, 200], 8).plain == "▁▂▄▆█"
    assert load_bars([900, 25, 25, 25, 25], 8).plain == "█▁▁▁▁"
    assert load_bars([0, 0, 0], 8).plain == "▁▁▁"
    assert load_bars([1000, 1010, 990, 1001], 8).plain == "▄▄▄▄"


def test_a_bar_of_several_experts_shows_the_one_farthest_from_the_mean():
    load = [100] * 16
    load[5], load[10] = 0, 200
    assert load_bars(load, 8).plain == "▄▄▁▄▄█▄▄"


@pytest.mark.parametrize(
    ("num_items", "num_chosen", "chosen"),
    [(3, 8, [0, 1, 2]), (32, 4, [0, 10, 21, 31]), (5, 1, [0]), (9, 8, None)],
)
def test_rows_are_evenly_spaced(num_items, num_chosen, chosen):
    indices = evenly_spaced(num_items, num_chosen)
    assert chosen is None or indices == chosen
    assert len(set(indices)) == min(num_items, num_chosen)
    assert indices[0] == 0
