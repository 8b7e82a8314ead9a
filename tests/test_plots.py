import math

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from moetrain import plots
from moetrain.errors import UserError
from moetrain.plots.figures import figures
from moetrain.plots.history import (
    drop_rate_by_choice,
    history,
    relative_load,
    running_mean,
    step_edges,
)
from moetrain.plots.panels import STYLE
from moetrain.sinks import METRICS_FILE, MetricsLog, read_metrics

MOE_FILES = [
    f"{name}.png"
    for name in ("overview", "loss", "drops", "slots", "load", "balance", "throughput")
]


def layer(load, drop_rate=0.0, choices=2):
    return {
        "load": load,
        "assigned": sum(load),
        "spilled": 0,
        "drop_rate": drop_rate,
        "drop_rate_by_choice": [drop_rate * j for j in range(choices)],
        "dropped_gate_mass": drop_rate / 2,
        "padding_waste": 0.2,
        "capacity_factor": 1.25,
        "effective_capacity_factor": 1.25,
        "max_vio": 0.5,
        "load_cv": 0.3,
        "load_entropy": 0.9,
        "dead_experts": 0,
    }


def train_lines(num_lines, num_layers=2, num_experts=4, choices=2, mfu=None):
    random = np.random.default_rng(0)
    return [
        {
            "step": 10 * (index + 1),
            "loss": 5 - 3 * index / num_lines,
            "balance_loss": 1.2,
            "z_loss": 0.5,
            "drop_rate": 0.1,
            "token_drop_rate": 0.05,
            "bad_steps": 0,
            "spikes": 0,
            "is_spike": False,
            "tokens_per_s": 1e4,
            "mfu": mfu,
            "layers": [
                layer(load.tolist(), 0.02 * i, choices)
                for i, load in enumerate(
                    random.multinomial(1000, [1 / num_experts] * num_experts, num_layers)
                    if num_layers
                    else []
                )
            ],
        }
        for index in range(num_lines)
    ]


def eval_line(step, loss, nats_per_byte=1.0):
    return {
        "step": step,
        "eval_loss": loss,
        "eval_nats_per_byte": nats_per_byte,
        "eval_drop_rate": 0.0,
    }


def write_run(run_dir, lines):
    log = MetricsLog(run_dir, resume_step=0)
    for line in lines:
        log.write(line)
    log.close()
    return run_dir


def draw(lines, byte_entropy=None, name="run"):
    """The figures by name, not yet rendered."""
    with matplotlib.rc_context(dict(STYLE)):
        return figures(history(name, lines, byte_entropy or {}))


def titles(figure):
    return [title for axes in figure.axes if (title := axes.get_title(loc="left"))]


def panel(figure, title):
    """The panel of a title, and what it shows: label -> (x, y)."""
    (axes,) = [axes for axes in figure.axes if axes.get_title(loc="left") == title]
    lines = [line for line in axes.lines if line.get_label() and line.get_label()[0] != "_"]
    return axes, {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in lines}


def curves(figure):
    """Label -> (x, y) of the labelled curves of a figure's first panel."""
    return panel(figure, figure.axes[0].get_title(loc="left"))[1]


def texts_that_overlap(figure):
    """Pairs of texts and legends of a rendered figure that lie on each other."""
    FigureCanvasAgg(figure).draw()
    boxes = []
    for axes in figure.axes:
        if not axes.get_visible():
            continue
        drawn = [*axes.texts, axes._left_title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            drawn += [
                tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high
            ]
        if legend := axes.get_legend():
            drawn += legend.get_texts()
        boxes += [(t.get_text(), t.get_window_extent()) for t in drawn if is_shown(t)]
    for part in (figure, *figure.subfigs):
        drawn = [part._suptitle, part._supxlabel, part._supylabel]
        drawn += [text for legend in part.legends for text in legend.get_texts()]
        boxes += [(t.get_text(), t.get_window_extent()) for t in drawn if t and is_shown(t)]
    assert all(box.x0 >= 0 and box.y0 >= 0 for _, box in boxes)
    assert all(box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1 for _, box in boxes)
    return [
        (one, other)
        for index, (one, box) in enumerate(boxes)
        for other, its in boxes[:index]
        if min(box.x1, its.x1) - max(box.x0, its.x0) > 1
        and min(box.y1, its.y1) - max(box.y0, its.y0) > 1
    ]


def is_shown(text):
    return text.get_visible() and bool(text.get_text())


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        ([*train_lines(3), eval_line(30, 3.0)], MOE_FILES),
        (train_lines(3, num_layers=0), ["overview.png", "loss.png", "throughput.png"]),
        ([eval_line(10, 3.0)], ["overview.png", "loss.png"]),
        ([], []),
    ],
)
def test_a_run_has_the_pictures_that_its_lines_allow(tmp_path, lines, files):
    written = plots.write_plots(write_run(tmp_path, lines))
    assert written == [tmp_path / "plots" / name for name in files]
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == sorted(files)
    for path in written:
        pixels = matplotlib.image.imread(path)[..., :3]
        height, width, _ = pixels.shape
        assert 400 < height < 3000
        assert 800 < width < 4000
        border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (border == 1).all(), f"{path.name} is cut off at its edge"
        assert 0.01 < (pixels < 1).any(axis=2).mean() < 0.9


def test_a_large_run_shows_every_layer():
    drawn = draw(train_lines(4, num_layers=32, num_experts=128, choices=8))
    assert titles(drawn["load"]) == [f"MoE layer {index}" for index in range(32)]
    assert titles(drawn["overview"]) == [
        *["Loss", "Drops", "Throughput"],
        *[f"MoE layer {index}" for index in (0, 10, 21, 31)],
    ]
    assert len(panel(drawn["balance"], "Largest load")[0].lines) == 33


SHAPES = {
    "one layer, one choice": train_lines(3, num_layers=1, choices=1),
    "one step": [*train_lines(1, num_layers=4), eval_line(10, 5.1)],
    "many layers": train_lines(3, num_layers=32, choices=8),
    "every expert chosen": train_lines(70, num_layers=3, num_experts=64, choices=64),
    "dense": [*train_lines(3, num_layers=0), eval_line(30, 2.0)],
    "held-out alone": [eval_line(10, 3.0), eval_line(20, 2.0)],
}


@pytest.mark.parametrize("lines", SHAPES.values(), ids=SHAPES.keys())
def test_no_text_lies_on_another_and_every_picture_names_the_run(lines):
    drawn = draw(lines, {"unigram": 3.31, "bigram": 3.3}, name="a-name-of-a-run-" * 8)
    drawn.pop("load", None)  # as in the overview, and slow with many layers
    for name, figure in drawn.items():
        assert figure.get_suptitle().startswith("a-name-of-a-run-"), name
        assert texts_that_overlap(figure) == [], name


def test_overlaps_are_recognised():
    figure = draw(train_lines(3), {})["loss"]
    figure.axes[0].set_title("Loss", pad=2)
    assert texts_that_overlap(figure) != []


def test_loss_shows_training_held_out_and_references_in_nats_per_token():
    lines = [*train_lines(3), eval_line(30, 3.0, nats_per_byte=0.75)]
    figure = draw(lines, {"unigram": 1.0, "bigram": 0.5})["loss"]
    shown = curves(figure)
    np.testing.assert_allclose(shown["training"], [[10, 20, 30], [5, 4, 3]])
    np.testing.assert_allclose(shown["held-out"], [[30], [3.0]])
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["unigram 4.00", "bigram 2.00"]


def test_no_references_without_an_evaluation():
    figure = draw(train_lines(3), {"unigram": 1.0})["loss"]
    assert not figure.axes[0].texts
    assert list(curves(figure)) == ["training"]


def test_drops_are_percent_by_layer_and_overall():
    figure = draw(train_lines(3, num_layers=2))["drops"]
    shown = curves(figure)
    np.testing.assert_allclose(shown["assignments"][1], [10, 10, 10])
    np.testing.assert_allclose(shown["tokens with no expert"][1], [5, 5, 5])
    by_layer = [line.get_ydata() for line in figure.axes[0].lines[:2]]
    np.testing.assert_allclose(by_layer, [[0, 0, 0], [2, 2, 2]])
    _, by_choice = panel(figure, "Drops by choice")
    np.testing.assert_allclose(by_choice["choice 1"][1], [0, 0, 0])
    np.testing.assert_allclose(by_choice["choice 2"][1], [1, 1, 1])  # mean of 0 and 2 %


def test_drops_of_evaluations_stand_beside_those_of_training():
    line = eval_line(30, 3.0) | {"eval_drop_rate": 0.04}
    _, shown = panel(draw([*train_lines(3), line])["drops"], "Drops")
    np.testing.assert_allclose(shown["held-out"], [[30], [4]])


def test_what_spills_is_shown_where_something_does():
    lines = train_lines(2)
    assert "spilled" not in panel(draw(lines)["drops"], "Drops")[1]
    lines[1]["layers"][0]["spilled"] = 500  # of 1000 in each of two layers
    _, shown = panel(draw(lines)["drops"], "Drops")
    np.testing.assert_allclose(shown["spilled"][1], [0, 25])


def test_a_run_continued_with_another_top_k_is_drawn():
    """First two choices, then three; the third has a curve from where it began."""
    lines = [*train_lines(2, choices=2), *train_lines(2, choices=3)]
    rates = drop_rate_by_choice(lines)
    assert rates.shape == (3, 4)
    assert rates[1].tolist() == pytest.approx([0.01] * 4)
    assert np.isnan(rates[2, :2]).all()
    assert rates[2, 2:].tolist() == pytest.approx([0.02] * 2)
    assert drop_rate_by_choice(lines[::-1]).shape == (2, 4)
    assert "drops" in figures(history("run", lines, {}))


def test_one_choice_has_no_panel_of_its_own_and_very_many_have_a_scale():
    assert titles(draw(train_lines(3, choices=1))["drops"]) == ["Drops"]
    figure = draw(train_lines(3, num_layers=1, choices=64))["drops"]
    axes, labelled = panel(figure, "Drops by choice")
    assert (len(axes.lines), labelled) == (64, {})
    assert [bar.get_ylabel() for bar in figure.axes if bar.get_label() == "<colorbar>"] == [
        "choice"
    ]


@pytest.mark.parametrize(
    ("picture", "title", "field", "factor"),
    [
        ("slots", "Empty slots", "padding_waste", 100),
        ("slots", "Slots provided", "effective_capacity_factor", 1),
        ("slots", "Gate weight dropped", "dropped_gate_mass", 100),
        ("balance", "Largest load", "max_vio", 1),
        ("balance", "Spread of the load", "load_cv", 1),
        ("balance", "Evenness of the load", "load_entropy", 1),
        ("balance", "Dead experts", "dead_experts", 1),
    ],
)
def test_a_figure_by_layer_and_its_mean(picture, title, field, factor):
    lines = train_lines(2, num_layers=2)
    for line, values in zip(lines, ([0.1, 0.3], [0.2, 0.6]), strict=True):
        for of_layer, value in zip(line["layers"], values, strict=True):
            of_layer[field] = value
    axes, labelled = panel(draw(lines)[picture], title)
    expected = factor * np.array([[0.1, 0.2], [0.3, 0.6], [0.2, 0.4]])
    np.testing.assert_allclose([line.get_ydata() for line in axes.lines], expected)
    np.testing.assert_allclose(labelled["mean of layers"][1], expected[-1])
    assert axes.get_ylim()[0] < 0 < axes.get_ylim()[1]


def test_rounding_errors_are_not_blown_up():
    lines = train_lines(9)
    for index, line in enumerate(lines):
        line["balance_loss"] = 1 + 1e-9 * index
    low, high = panel(draw(lines)["balance"], "Balance loss")[0].get_ylim()
    assert 0.04 < high - low < 0.06
    assert low < 1 < high


def test_losses_of_the_router_are_those_of_the_run():
    figure = draw(train_lines(2))["balance"]
    np.testing.assert_allclose(panel(figure, "Balance loss")[0].lines[0].get_ydata(), [1.2, 1.2])
    np.testing.assert_allclose(panel(figure, "Router z-loss")[0].lines[0].get_ydata(), [0.5, 0.5])


def test_a_heat_map_shows_load_over_the_mean_at_its_step():
    lines = train_lines(2, num_layers=1)
    lines[0]["layers"][0]["load"] = [400, 0, 0, 0]
    lines[1]["layers"][0]["load"] = [100, 100, 50, 150]
    axes = draw(lines)["load"].axes[0]
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), [[4, 1], [0, 1], [0, 0.5], [0, 1.5]])
    assert image.norm(0) == 0
    assert image.norm(1) == 0.5
    assert axes.get_xlim() == (5, 25)
    assert axes.get_ylim() == (-0.5, 3.5)


def test_a_long_curve_is_smoothed_over_the_raw_one():
    lines = train_lines(600, num_layers=0)
    for index, line in enumerate(lines):
        line["loss"] = 3.0 + (-1) ** index
    raw, smooth = draw(lines)["loss"].axes[0].lines
    assert np.ptp(raw.get_ydata()) == 2
    assert np.ptp(smooth.get_ydata()) < 0.3


def test_throughput_tells_the_utilisation_where_known():
    figure = draw(train_lines(3, mfu=0.412))["throughput"]
    assert titles(figure) == ["Throughput (median MFU 41.2 %)"]
    assert titles(draw(train_lines(3))["throughput"]) == ["Throughput"]


def test_drops_are_smoothed_as_the_loss_is():
    lines = train_lines(600, num_layers=2)
    for index, line in enumerate(lines):
        line["drop_rate"] = line["layers"][1]["drop_rate"] = 0.5 + 0.5 * (-1) ** index
    axes, shown = panel(draw(lines)["drops"], "Drops")
    assert np.ptp(shown["assignments"][1]) < 15
    assert [np.ptp(line.get_ydata()) for line in axes.lines[2:4]] == [100, pytest.approx(9, abs=6)]


@pytest.mark.parametrize("num_lines", [4, 100])
def test_a_skipped_step_is_a_gap_and_is_counted(tmp_path, num_lines):
    lines = train_lines(num_lines)
    lines[1] |= {"loss": math.nan, "grad_norm": math.nan, "z_loss": math.nan}
    lines[1]["layers"][0]["dropped_gate_mass"] = math.nan
    for line in lines[1:]:
        line["bad_steps"] = 1
    run_dir = write_run(tmp_path, [*lines, eval_line(40, math.nan, nats_per_byte=math.nan)])
    drawn = draw(read_metrics(run_dir), {"unigram": 1.0})
    axes, shown = panel(drawn["loss"], "Loss (1 step skipped)")
    raw = axes.lines[0].get_ydata()
    np.testing.assert_allclose(raw[:3], [5, math.nan, 5 - 3 * 2 / num_lines])
    np.testing.assert_allclose(shown["held-out"][1], [math.nan])
    if num_lines == 100:  # the running mean goes on over the gap
        assert np.isfinite(shown["training"][1]).all()


def test_a_run_of_skipped_steps_alone_is_drawn(tmp_path):
    lines = train_lines(3)
    for line in lines:
        line |= {"loss": math.nan, "balance_loss": math.nan, "z_loss": math.nan, "bad_steps": 3}
        for of_layer in line["layers"]:
            of_layer["dropped_gate_mass"] = math.nan
    assert len(plots.write_plots(write_run(tmp_path, lines))) == len(MOE_FILES)


def test_nothing_dropped_is_a_line_at_zero_that_can_be_seen():
    lines = train_lines(3, num_layers=1)
    for line in lines:
        line |= {"drop_rate": 0.0, "token_drop_rate": 0.0}
    axes, shown = panel(draw(lines)["drops"], "Drops")
    np.testing.assert_allclose(shown["assignments"][1], [0, 0, 0])
    bottom, top = axes.get_ylim()
    assert bottom < 0
    assert top == 1


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path / METRICS_FILE} does not exist"):
        plots.write_plots(tmp_path)


def test_a_layer_without_assignments_has_no_relative_load():
    lines = [{"layers": [layer([0, 0], 0)]}, {"layers": [layer([3, 1], 0)]}]
    np.testing.assert_allclose(relative_load(lines, 0), [[0, 1.5], [0, 0.5]])


def test_a_running_mean_uses_what_is_there():
    values = np.array([1, math.nan, 3, 5, 7, 9.0])
    np.testing.assert_allclose(running_mean(values, 3), [1, 2, 4, 5, 7, 8])
    np.testing.assert_allclose(running_mean(np.array([math.nan] * 3), 3), [math.nan] * 3)


@pytest.mark.parametrize(
    ("steps", "edges"),
    [([10], [9.5, 10.5]), ([10, 20], [5, 15, 25]), ([1, 10, 20, 23], [-3.5, 5.5, 15, 21.5, 24.5])],
)
def test_columns_meet_halfway_between_steps(steps, edges):
    np.testing.assert_allclose(step_edges(np.array(steps)), edges)
