"""Live sweeps (`python benchmarks/capacity.py`), small and in this process."""

from __future__ import annotations

import errno
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launchers import run
from runs import train, write_config

from moetrain import settings
from moetrain.build import build_model
from moetrain.mesh import Mesh, process_group
from moetrain.moe import packed
from moetrain.sinks import read_metrics
from moetrain.sizes import sizes
from moetrain.step import Position
from moetrain.testing import simulate_ranks
from moetrain.train import set_up

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import capacity  # noqa: E402
from harness import CLEAR_PEAK  # noqa: E402
from sweeping import live, plan, rates, replayed, table  # noqa: E402
from sweeping.plan import Length, Variant  # noqa: E402

LENGTH = Length(warm_start=2, steps=4)
FACTORS = [0.5, 1.0, None]


def silent(_: str) -> None:
    pass


def swept(
    path: Path, folder: Path, world: int, repeats: int, **values: Any
) -> tuple[list[Variant], list[live.Live]]:
    """Sweep a config as it is spread over so many ranks; the trace goes into a folder."""
    base = settings.load(path, ["--parallel.ep", str(world)])
    able, refused = plan.variants(base, values, LENGTH.total, world)
    assert not refused

    def of_rank() -> list[live.Live]:
        mesh = Mesh(torch.device("cpu"), world)
        own = plan.own(able, base)
        return live.sweep(able, own, base, LENGTH, repeats, mesh, folder, silent)

    return able, simulate_ranks(world, of_rank)[0]


def counts(trail: live.Trail) -> list[tuple[int, int, list[int]]]:
    """What was dropped and chosen, step by step, of the first MoE layer."""
    layers = [step.layers[0] for step in trail.steps]
    return [(layer["assigned"], layer["dropped"], layer["load"]) for layer in layers]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model that learns in milliseconds."""
    return write_config(
        tmp_path_factory.mktemp("sweep"),
        moe={"eval_capacity_factor": 0.75},
        train={"steps": LENGTH.total, "global_batch": 4},
        eval={"sequences": 2},
    )


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sweep in one process, with its trace."""
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module")
def both(config: Path, recorded: Path) -> tuple[list[Variant], list[live.Live]]:
    """The variants, and two repeats of each in one process, with turns of two steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "TURN", 2)
        return swept(config, recorded, 1, repeats=2, capacity_factor=FACTORS)


@pytest.fixture(scope="module")
def alone(both: tuple[list[Variant], list[live.Live]]) -> list[live.Live]:
    """What was seen of each factor."""
    return both[1]


def test_the_own_setting_trains_as_if_it_were_alone(
    config: Path, alone: list[live.Live], tmp_path: Path
) -> None:
    """Weights, moments and settings of others leave no trace in it, nor do evaluations."""
    flags = "--parallel.ep", 1, "--eval.every", 0, "--checkpoint.every", 0
    assert train(config, "--name", "alone", *flags) == 0
    lines = [line for line in read_metrics(config.parent / "runs" / "alone") if "loss" in line]
    (trail, other), steps = alone[FACTORS.index(1.0)].trails, lines[LENGTH.warm_start :]
    assert [step.step for step in trail.steps] == [line["step"] for line in steps]
    assert [step.loss for step in trail.steps] == [line["loss"] for line in steps]
    assert [step.layers for step in trail.steps] == [line["layers"] for line in steps]
    # The other repeat starts alike, and reads what follows.
    assert other.held_out[0] == trail.held_out[0]
    assert other.steps[0].loss != trail.steps[0].loss


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(("world", "chunks"), [(1, 1), (2, 1), (2, 2)])
def test_executed_rows_are_those_that_products_get(
    config: Path, tmp_path: Path, world: int, chunks: int, precision: str
) -> None:
    """Counted where the experts' second products are made, one of which every row has."""
    flags = {"parallel.ep": world, "parallel.overlap_chunks": chunks, "engine.precision": precision}
    words = [str(word) for flag, value in flags.items() for word in (f"--{flag}", value)]
    rows, plain = [], packed.swiglu_forward

    def counting(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(hidden.shape[:-1].numel())
        return plain(hidden)

    loaded = settings.load(config, words)

    def of_rank() -> int:
        run = set_up(loaded, tmp_path, Mesh(torch.device("cpu"), world))
        return live.step(run, Position())[1].executed_rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "swiglu_forward", counting)
        told = simulate_ranks(world, of_rank)
    assert told == [sum(rows)] * world


def test_variants_part_at_the_start_and_drop_by_their_factor(alone: list[live.Live]) -> None:
    for repeat in range(2):
        tight, own, dropless = (one.trails[repeat] for one in alone)
        assert tight.held_out[0] == own.held_out[0] == dropless.held_out[0]
        assert [one.step for one in own.held_out] == [2, 4, 6]
        dropped = [sum(dropped for _, dropped, _ in counts(t)) for t in (tight, own, dropless)]
        assert dropped[0] > dropped[1] > dropped[2] == 0
        # The first step routes alike; what was dropped tells from then on.
        assert counts(tight)[0][2] == counts(own)[0][2] == counts(dropless)[0][2]
        assert len({trail.held_out[-1].loss for trail in (tight, own, dropless)}) == 3
        assert dropless.own is not None
        assert dropless.own.drop_rate == 0 < dropless.held_out[-1].drop_rate
        assert all(len(trail.turns) == 2 for trail in (tight, own, dropless))


def test_facts_of_a_variant(config: Path, alone: list[live.Live]) -> None:
    """Alone a rank sends nothing, and holds weights and two moments of each, in fp32."""
    numel = sizes(build_model(settings.load(config), 257)).total
    for one in alone:
        assert one.facts.all_to_all_bytes == 0
        assert 3 * 4 * numel <= one.facts.held_bytes < 3 * 4 * numel + 2000  # steps are counted


@pytest.mark.skipif(not CLEAR_PEAK.exists(), reason="Linux alone tells of peak memory")
def test_the_memory_of_a_step_is_what_it_takes_at_most(config: Path, tmp_path: Path) -> None:
    loaded, plain, taken = settings.load(config), live.train_step, 64 << 20

    def greedy(*args: Any) -> Any:
        torch.ones(taken, dtype=torch.uint8)
        return plain(*args)

    def step_bytes() -> int | None:
        mesh = Mesh(torch.device("cpu"))
        return live.Model(loaded, Length(0, 2), mesh, tmp_path).facts(loaded).step_bytes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live, "train_step", greedy)
        (found,) = simulate_ranks(1, step_bytes)
    assert found is not None
    assert 0.9 * taken < found < 2 * taken  # Linux counts in batches


def test_ranks_with_experts_of_their_own_sweep_to_the_same(
    config: Path, alone: list[live.Live], tmp_path: Path
) -> None:
    able, spread = swept(config, tmp_path, 2, repeats=1, capacity_factor=FACTORS[:2])
    for one, other in zip(alone, spread, strict=False):
        ours, theirs = one.trails[0], other.trails[0]
        assert counts(theirs) == counts(ours)
        losses = [step.loss for step in theirs.steps]
        assert losses == pytest.approx([step.loss for step in ours.steps], rel=1e-5)
    # There and back, forward and backward: one micro-batch of 2 sequences of 32, 16 wide in fp32,
    # half of K·T slots.
    assert able[0].label == "0.5"
    assert spread[0].facts.all_to_all_bytes == 4 * 64 * 2 // 2 * 16 * 4


def test_other_shapes_have_starts_of_their_own(config: Path, tmp_path: Path) -> None:
    able, seen = swept(config, tmp_path, 1, repeats=1, experts=[4, 8], router=["topk", "sigmoid"])
    assert [variant.label for variant in able] == [
        *("topk, E 4, 1.0", "topk, E 8, 1.0", "sigmoid, E 4, 1.0", "sigmoid, E 8, 1.0")
    ]
    trails = [one.trails[0] for one in seen]
    assert len({trail.held_out[0].loss for trail in trails}) == 4
    assert [len(trail.steps[0].layers[0]["load"]) for trail in trails] == [4, 8, 4, 8]


def test_settings_of_one_shape_part_from_one_start(config: Path, tmp_path: Path) -> None:
    axes = {"drop_policy": ["position", "spill"], "group": ["sequence", 16], "top_k": [1]}
    able, seen = swept(config, tmp_path, 1, repeats=1, **axes)
    assert len({variant.shape for variant in able}) == 1
    trails = [one.trails[0] for one in seen]
    assert len({str(counts(trail)[0][2]) for trail in trails}) == 1  # whatever they drop
    assert len({trail.steps[-1].loss for trail in trails}) == len(able) == 4


def test_a_setting_reaches_the_layers(config: Path) -> None:
    """All that may differ between variants of one shape."""
    base = settings.load(config)
    moe = {"capacity_factor": 0.5, "drop_policy": "spill", "spill_depth": 2, "group": 16}
    with process_group() as device:
        run = set_up(base, config.parent, Mesh(device))
        live.with_setting(run, plan.with_moe(base, min_capacity=3, **moe))
        wanted = build_model(plan.with_moe(base, min_capacity=3, **moe), 257)
        for layer, other in zip(
            live.layers_of(run.engine.model), live.layers_of(wanted), strict=True
        ):
            plain = {name: value for name, value in vars(layer).items() if name[0] != "_"}
            for name in plain.keys() - {"dispatcher", "training"}:
                assert plain[name] == getattr(other, name), name


def test_recorded_routing_replays_to_what_the_own_setting_dropped(
    both: tuple[list[Variant], list[live.Live]], recorded: Path
) -> None:
    variants, seen = both
    own = variants[FACTORS.index(1.0)]
    rows = replayed.beside(table.live_rows(variants, seen, own), variants, own, recorded)
    layers = [step.layers for step in seen[FACTORS.index(1.0)].trails[0].steps]
    tight, as_live, dropless = (row.replayed_drop_rate for row in rows)
    assert as_live == rates.rates(rates.late(layers)).drop_rate > 0
    assert tight is not None
    assert tight > as_live
    assert dropless == 0


def test_a_run_with_a_trace_is_replayed_on_as_many_ranks_as_one_likes(
    recorded: Path, alone: list[live.Live], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--capacity-factors 0.5 1.0 --drop-policies position spill --parallel.ep 4 --out"
    assert capacity.main([str(recorded), *words.split(), str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("spill, 1.0: ")
    rows = json.loads((tmp_path / "capacity.json").read_text())["variants"]
    assert [row["label"] for row in rows] == [
        *("position, 0.5", "position, 1.0", "spill, 0.5", "spill, 1.0")
    ]
    assert rows[3]["rates"][0] < rows[1]["rates"][0] < rows[0]["rates"][0]
    assert all(row["all_to_all_bytes"] > 0 for row in rows)
    tight, roomy = rows[0]["straggler_factor"], rows[1]["straggler_factor"]
    assert 1 < tight < roomy < 4  # full experts are alike
    assert {row["loss"] for row in rows} == {row["tokens_per_s"] for row in rows} == {None}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--routers switch", "--routers needs trainings"),
        ("--train.lr 1", "of the settings only --parallel.ep"),
        ("--parallel.ep 3", "parallel.ep (3)"),
        ("--warm-start 10", "so --warm-start (10) has no effect"),
    ],
)
def test_what_a_trace_cannot_tell_is_refused(
    recorded: Path,
    alone: list[live.Live],
    flags: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert capacity.main([str(recorded), *flags.split()]) == 2
    assert message in capsys.readouterr().err


def test_one_command_writes_the_report(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--capacity-factors 1.0 null --routers topk switch --warm-start 0 --steps 2 --repeats 1"
    args = [str(config), *words.split(), "--out", str(tmp_path), "--name", "small"]
    assert capacity.main(args) == 0
    said = capsys.readouterr()
    kept = json.loads((tmp_path / "capacity.json").read_text())
    assert kept["advice"]["headline"] == said.out.strip()
    assert [row["label"] for row in kept["variants"]] == ["topk, 1.0", "topk, dropless"]
    assert [one["label"] for one in kept["refused"]] == ["switch, 1.0", "switch, dropless"]
    assert "capacity: left out: switch, 1.0: moe.top_k (2) must be 1" in said.err
    assert "Choosing a capacity factor for small" in (tmp_path / "capacity.html").read_text()


def test_torchrun_sweeps_with_experts_of_their_own(config: Path, tmp_path: Path) -> None:
    """By the documented command; half as many slots are half as much to send."""
    words = "--capacity-factors 0.5 1.0 --warm-start 1 --steps 2 --repeats 1 --parallel.ep 2"
    done = run(
        *(sys.executable, "-m", "moetrain.torchrun", "--nproc-per-node", "2"),
        *("benchmarks/capacity.py", config, *words.split(), "--out", tmp_path / "report"),
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0, done.stderr
    kept = json.loads((tmp_path / "report/capacity.json").read_text())
    assert "on 2 ranks with expert parallelism 2" in (tmp_path / "report/capacity.md").read_text()
    assert kept["advice"]["headline"] == done.stdout.strip()
    half, whole = (row["all_to_all_bytes"] for row in kept["variants"])
    assert whole == 2 * half > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            "--capacity-factors -1",
            "-1.0: moe.capacity_factor (-1.0) must be greater than 0 or 'auto' or null",
        ),
        ("--steps 1", "--steps (1) must be 2 or more"),
        ("--parallel.ep 2", "parallel.ep (2)"),
        ("--moe.capacity_facto 2", "moe.capacity_facto is not a setting"),
        ("--groups some", "moe.group (some) must be"),
        ("--engine.kind deepspeed", "engine.kind (deepspeed)"),
    ],
)
def test_mistakes_are_one_message(
    config: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert capacity.main([str(config), *flags.split()]) == 2
    said = capsys.readouterr().err
    assert said.startswith("moetrain: error: ")
    assert message in said
    assert "Traceback" not in said


@pytest.mark.parametrize("source", ["config", "recorded"])
def test_a_report_that_cannot_be_written_is_known_before_anything_is_done(
    source: str, request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "report"
    assert capacity.main([str(request.getfixturevalue(source)), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said == f"moetrain: error: --out ({out}) cannot be written: Not a directory\n"


def test_a_report_that_cannot_be_written_in_the_end_is_no_traceback(
    recorded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(capacity, "write", full)
    assert capacity.main([str(recorded), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert (
        said == f"moetrain: error: --out ({tmp_path}) cannot be written: No space left on device\n"
    )


def test_a_start_that_diverges_is_said_at_once(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--train.lr 1e30 --train.warmup-steps 0 --train.max-bad-steps 2 --warm-start 9"
    assert capacity.main([str(config), *flags.split(), "--out", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "(topk, K 2, E 4): loss or gradient was not finite up to step" in said
    assert "try a train.lr below 1e+30" in said
