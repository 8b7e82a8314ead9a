import math

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from moetrain import plots
from moetrain.errors import UserError
from moetrain.sinks import METRICS_FILE, MetricsLog

MOE_FILES = ["overview.png", "loss.png", "drops.png", "load.png", "throughput.png"]


def layer(load, drop_rate):
    return {"load": load, "drop_rate": drop_rate}


def train_lines(num_lines, num_layers=2, num_experts=4, mfu=None):
    random = np.random.default_rng(0)
    return [
        {
            "step": 10 * (index + 1),
            "loss": 5 - 3 * index / num_lines,
            "drop_rate": 0.1,
            "token_drop_rate": 0.05,
            "tokens_per_s": 1e4,
            "mfu": mfu,
            "layers": [
                layer(random.multinomial(1000, [1 / num_experts] * num_experts).tolist(), 0.02 * i)
                for i in range(num_layers)
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


def draw(lines, byte_entropy=None):
    """The figures by name, not yet rendered."""
    evals = [line for line in lines if "eval_loss" in line]
    train = [line for line in lines if "loss" in line]
    run = plots._Run(train, evals, plots.per_token(byte_entropy or {}, evals))
    with matplotlib.rc_context(plots._STYLE):
        return plots._figures(run)


def titles(figure):
    return [title for axes in figure.axes if (title := axes.get_title(loc="left"))]


def curves(figure):
    """Label -> (x, y) of the labelled curves of a figure's first panel."""
    lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
    return {line.get_label(): (line.get_xdata(), line.get_ydata()) for line in lines}


@pytest.mark.parametrize(
    ("lines", "files"),
    [
        (train_lines(1, num_layers=1), MOE_FILES),
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


def test_a_large_run_is_drawn(tmp_path):
    lines = train_lines(150, num_layers=32, num_experts=128)
    figures = draw(lines)
    assert titles(figures["load"]) == [f"MoE layer {index}" for index in range(32)]
    overview = titles(figures["overview"])
    assert overview == [
        *[f"MoE layer {index}" for index in (0, 10, 21, 31)],
        *["Loss", "Drops", "Throughput"],
    ]
    figures["load"].savefig(tmp_path / "load.png")


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
    np.testing.assert_allclose(shown["assignments, all layers"][1], [10, 10, 10])
    np.testing.assert_allclose(shown["tokens with no expert left"][1], [5, 5, 5])
    by_layer = [line.get_ydata() for line in figure.axes[0].lines[:2]]
    np.testing.assert_allclose(by_layer, [[0, 0, 0], [2, 2, 2]])


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


def test_a_null_loss_is_a_gap(tmp_path):
    lines = train_lines(4)
    lines[1]["loss"] = math.nan
    run_dir = write_run(tmp_path, [*lines, eval_line(40, math.nan, nats_per_byte=math.nan)])
    figure = draw(plots.read_metrics(run_dir), {"unigram": 1.0})["loss"]
    np.testing.assert_allclose(curves(figure)["training"][1], [5, math.nan, 3.5, 2.75])
    np.testing.assert_allclose(curves(figure)["held-out"][1], [math.nan])
    figure.savefig(tmp_path / "loss.png")


def test_a_missing_run_is_named(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path / METRICS_FILE} does not exist"):
        plots.write_plots(tmp_path)


def test_a_layer_without_assignments_has_no_relative_load():
    lines = [{"layers": [layer([0, 0], 0)]}, {"layers": [layer([3, 1], 0)]}]
    np.testing.assert_allclose(plots.relative_load(lines, 0), [[0, 1.5], [0, 0.5]])


def test_a_running_mean_uses_what_is_there():
    values = np.array([1, math.nan, 3, 5, 7, 9.0])
    np.testing.assert_allclose(plots.running_mean(values, 3), [1, 2, 4, 5, 7, 8])
    np.testing.assert_allclose(plots.running_mean(np.array([math.nan] * 3), 3), [math.nan] * 3)


@pytest.mark.parametrize(
    ("steps", "edges"),
    [([10], [9.5, 10.5]), ([10, 20], [5, 15, 25]), ([1, 10, 20, 23], [-3.5, 5.5, 15, 21.5, 24.5])],
)
def test_columns_meet_halfway_between_steps(steps, edges):
    np.testing.assert_allclose(plots.step_edges(np.array(steps)), edges)
