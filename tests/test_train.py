"""Training from the command line to the files it leaves, and every way of continuing it."""

from __future__ import annotations

import json
import math
import types
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job
from runs import (
    assert_same_bits,
    lines_without_timings,
    saved_tensors,
    train,
    train_on,
    write_config,
    write_text,
)

from moetrain import checkpoint, cli, settings
from moetrain.metrics import EvalLine, LayerLine, TrainLine
from moetrain.optim import lr_at
from moetrain.sinks import read_metrics
from moetrain.spikes import Window
from moetrain.step import sample_indices

ROOT = Path(__file__).parents[1]
STEPS, EXPERTS, TOP_K, STEP_TOKENS = 8, 4, 2, 8 * 32


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """With a router whose bias is state beside the weights, and a loss over whole batches."""
    moe = {"router": "sigmoid", "bias_update_rate": 0.01, "balance_scope": "batch"}
    return write_config(tmp_path_factory.mktemp("train"), moe=moe)


@pytest.fixture(scope="module")
def run(config) -> Path:
    """The folder of a finished run, pictures and all; tests leave it as it is."""
    assert cli.main(["train", str(config)]) == 0
    return config.parent / "runs" / "run"


# ---------------------------------------------------------------- what a run leaves


def has_type(value: object, hint: object) -> bool:
    """Whether a value read from JSON has exactly the type a line promises."""
    if isinstance(hint, types.UnionType):
        return any(has_type(value, option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is list:
        (item,) = typing.get_args(hint)
        return type(value) is list and all(has_type(element, item) for element in value)
    if isinstance(hint, type) and hasattr(hint, "__required_keys__"):
        return (
            type(value) is dict
            and all(has_type(value[name], of) for name, of in typing.get_type_hints(hint).items())
            and value.keys() == typing.get_type_hints(hint).keys()
        )
    return value is None if hint is type(None) else type(value) is hint


def test_every_line_has_every_field_in_its_exact_type(run):
    lines = read_metrics(run)
    training = [line for line in lines if "loss" in line]
    evaluation = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in training] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluation] == [3, 6, 8]
    assert len(training) + len(evaluation) == len(lines)
    for line in training:
        assert has_type(line, TrainLine), line
    for line in evaluation:
        assert has_type(line, EvalLine), line
    named_in_the_docs = {
        "step", "tokens", "loss", "balance_loss", "z_loss", "grad_norm", "lr", "drop_rate",
        "token_drop_rate", "max_vio", "tokens_per_s", "tflops_per_device", "mfu", "step_time_s",
        "memory_gib", "layers",
    }  # fmt: skip
    assert named_in_the_docs <= training[0].keys()
    assert {"assigned", "kept", "dropped", "spilled", "not_sampled", "load"} <= set(
        typing.get_type_hints(LayerLine)
    )


def test_the_ledger_is_conserved_in_every_line(run):
    for line in (line for line in read_metrics(run) if "loss" in line):
        (layer,) = line["layers"]  # the first of two blocks is dense
        assert layer["assigned"] == TOP_K * STEP_TOKENS == sum(layer["load"])
        outcomes = (layer[name] for name in ("kept", "spilled", "dropped", "not_sampled"))
        assert layer["assigned"] == sum(outcomes)
        assert layer["slots"] == layer["assigned"]  # capacity factor 1
        assert len(layer["load"]) == len(layer["kept_load"]) == EXPERTS
        assert sum(layer["row_load"]) == layer["kept"] + layer["spilled"]
        assert sum(map(sum, layer["outcomes_by_rank"])) == layer["assigned"]
        by_choice = layer["drop_rate_by_choice"]
        assert sum(by_choice) / TOP_K == pytest.approx(layer["drop_rate"])
        assert line["drop_rate"] == layer["dropped"] / layer["assigned"]
        assert line["token_drop_rate"] == layer["lost_tokens"] / STEP_TOKENS
        assert line["max_vio"] == pytest.approx(
            max(layer["load"]) * EXPERTS / layer["assigned"] - 1
        )
    assert layer["dropped"] > 0


def test_numbers_of_a_run_are_what_they_should_be(run):
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["tokens"] for line in lines] == [n * STEP_TOKENS for n in range(1, STEPS + 1)]
    assert [line["lr"] for line in lines] == [
        lr_at(step, steps=STEPS, peak=3e-3, min_ratio=0.1, warmup_steps=2, schedule="cosine",
              decay_fraction=0.2)
        for step in range(1, STEPS + 1)
    ]  # fmt: skip
    assert abs(lines[0]["loss"] - math.log(257)) < 1
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.3
    assert all(line["grad_norm"] > 0 for line in lines)
    assert all(0.9 < line["balance_loss"] < EXPERTS for line in lines)


def test_a_run_leaves_its_settings_checkpoints_and_plots(config, run):
    assert settings.load(run / "config.yaml") == settings.load(config)
    assert [path.name for path in checkpoint.committed(run)] == ["step-00000006", "step-00000008"]
    assert (run / "plots" / "overview.png").stat().st_size > 0
    tensors = saved_tensors(run / "checkpoints" / "step-00000008")
    assert {float(t) for name, t in tensors.items() if name.endswith(".step")} == {STEPS}
    experts = tensors["model.blocks.1.moe.experts.w_gate_up"]
    assert experts.shape == (EXPERTS, 16, 2 * 16)
    position = checkpoint.read_manifest(run / "checkpoints" / "step-00000008").extra["position"]
    window = Window(**position.pop("window"))
    assert position == {
        "step": STEPS, "samples": 8 * STEPS, "tokens": STEP_TOKENS * STEPS,
        "bad_steps": 0, "bad_in_a_row": 0, "owes_evaluation": False, "spikes": 0,
        "autopilot": {"factors": [], "steps": 0, "sums": []},
    }  # fmt: skip
    assert window.grad_norms == [line["grad_norm"] for line in read_metrics(run) if "loss" in line]
    bias_E = tensors["model.blocks.1.moe.router.bias"]
    assert bias_E.dtype == torch.float32
    assert bias_E.unique().numel() > 1
    assert 0.01 <= bias_E.abs().max() <= 0.01 * STEPS * 1.0001


def test_samples_of_all_ranks_and_micro_batches_make_the_global_batch(config):
    made = settings.load(config, ["--train.global-batch", "16"])
    for world in (1, 2, 4, 8):
        taken = [i for rank in range(world) for part in sample_indices(made, rank, world, 100)
                 for i in part]  # fmt: skip
        assert sorted(taken) == list(range(100, 116))
        # Micro-steps advance through the batch together, whatever the world size.
        first = [i for rank in range(world) for i in sample_indices(made, rank, world, 100)[0]]
        assert first == list(range(100, 100 + 2 * world))


# ---------------------------------------------------------------- continuing


def snapshot(run: Path) -> dict[str, object]:
    """The metrics, and size and time of change of everything in the checkpoints."""
    files = {path: path.stat() for path in (run / "checkpoints").rglob("*")}
    found = {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in files.items()}
    return {**found, "metrics": (run / "metrics.jsonl").read_text()}


def test_a_finished_run_has_nothing_to_do_and_says_so(config, run, capsys):
    before = snapshot(run)
    assert train(config) == 0
    assert snapshot(run) == before
    assert "already at step 8 of 8" in capsys.readouterr().out


def test_a_branch_from_a_checkpoint_repeats_the_run_bit_by_bit(config, run):
    start = run / "checkpoints" / "step-00000006"
    assert train(config, "--name", "branch", "--checkpoint.resume", start) == 0
    branch = run.parent / "branch"
    assert_same_bits(*(f / "checkpoints" / "step-00000008" for f in (branch, run)))
    assert lines_without_timings(branch) == [
        line for line in lines_without_timings(run) if line["step"] > 6
    ]


def test_a_longer_schedule_continues_a_finished_run(config, run, capsys):
    flags = ["--name", "longer", "--checkpoint.resume", run]
    assert train(config, *flags, "--train.steps", 10, "--eval.every", 0) == 0
    assert "from step 8" in capsys.readouterr().out
    assert [line["step"] for line in read_metrics(run.parent / "longer")] == [9, 10]


def test_without_log_evaluation_and_checkpoints_a_run_still_trains(config, capsys):
    off = ("--log.every", 0, "--eval.every", 0, "--checkpoint.every", 0)
    assert train(config, "--name", "silent", *off, "--train.steps", 2) == 0
    folder = config.parent / "runs" / "silent"
    assert read_metrics(folder) == []
    assert not (folder / "checkpoints").exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("from the start")


@pytest.mark.parametrize(
    "moe",
    [
        {"router": "gshard", "shared_experts": 1},
        {"router": "sigmoid", "bias_update_rate": 0.02, "balance_scope": "batch"},
    ],
    ids=lambda moe: moe["router"],
)
def test_a_run_that_changes_its_layout_on_the_way_trains_the_same(tmp_path, moe):
    config = write_config(
        tmp_path,
        name="whole",
        engine={"precision": "fp64"},
        moe={"capacity_factor": 0.75, **moe},
        data={"mask_documents": True},
        train={"steps": 6, "micro_batch": 1},
        checkpoint={"every": 2, "keep": 3},
    )
    whole, _ = train_on(1, config)
    start = whole
    for step, world, flags in (
        (2, 4, ["--parallel.ep", 4, "--train.micro-batch", 2]),
        (4, 4, ["--parallel.ep", 2, "--parallel.dp-replicate", 2]),
    ):
        flags += ["--checkpoint.resume", start / "checkpoints" / f"step-{step:08d}"]
        start, _ = train_on(world, config, "--name", f"from-{step}", *flags)
        last = (run / "checkpoints" / "step-00000006" for run in (start, whole))
        ours, theirs = map(saved_tensors, last)
        for name, tensor in ours.items():
            torch.testing.assert_close(tensor, theirs[name], rtol=1e-9, atol=1e-11, msg=name)
            if name.endswith("router.bias"):
                assert torch.equal(tensor, theirs[name])
                assert tensor.any()
        assert any(name.endswith("router.bias") for name in ours) == (moe["router"] == "sigmoid")
        expected = [line for line in without_ranks(whole) if line["step"] > step]
        for line, other in zip(without_ranks(start), expected, strict=True):
            assert line.pop("layers", None) == other.pop("layers", None)
            assert line == pytest.approx(other, rel=1e-9)


def without_ranks(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, with the outcomes of all ranks for those of each, and in the layers
    counts alone: the gate weight dropped, of which a line has the mean, is rounded."""
    lines = lines_without_timings(run)
    for layer in (layer for line in lines for layer in line.get("layers", [])):
        by_rank, _ = layer.pop("outcomes_by_rank"), layer.pop("dropped_gate_mass")
        layer["outcomes"] = [sum(column) for column in zip(*by_rank, strict=True)]
    return lines


# ---------------------------------------------------------------- steps that are not finite


@pytest.fixture(scope="module")
def bad_run(tmp_path_factory) -> tuple[Path, Path]:
    """The configuration and the folder of a run whose steps 3, 5 and 6 were bad; of a row of three
    it would have died."""
    config = write_config(
        tmp_path_factory.mktemp("bad"),
        name="bad",
        moe={"router": "sigmoid", "bias_update_rate": 0.01},
        parallel={"ep": 2},
        checkpoint={"every": 1, "keep": 8},
    )
    run, errors = train_on(2, config, bad=frozenset({3, 5, 6}))
    assert errors == ["", ""]
    return config, run


def counters(run: Path, step: int) -> tuple[int, int]:
    position = checkpoint.read_manifest(run / "checkpoints" / f"step-{step:08d}").extra["position"]
    return position["bad_steps"], position["bad_in_a_row"]


def test_bad_steps_are_counted_in_metrics_and_checkpoints(bad_run):
    _, run = bad_run
    lines = [line for line in read_metrics(run) if "loss" in line]
    assert [line["bad_steps"] for line in lines] == [0, 0, 1, 1, 2, 3, 3, 3]
    for line in lines:
        assert (line["grad_norm"] is None) == (line["step"] in (3, 5, 6))
        assert line["layers"][0]["assigned"] == TOP_K * STEP_TOKENS
    assert [line["tokens"] for line in lines] == [n * STEP_TOKENS for n in range(1, STEPS + 1)]
    assert [counters(run, step) for step in range(2, 9)] == [
        (0, 0), (1, 1), (1, 0), (2, 1), (3, 2), (3, 0), (3, 0),
    ]  # fmt: skip


def test_a_bad_step_changes_no_bit_of_what_is_saved(bad_run):
    _, run = bad_run
    saved = {step: saved_tensors(run / "checkpoints" / f"step-{step:08d}") for step in range(2, 9)}
    for step in range(3, 9):
        is_same = all(torch.equal(t, saved[step - 1][name]) for name, t in saved[step].items())
        assert is_same == (step in (3, 5, 6))


def test_counters_outlive_the_process(bad_run):
    """Two bad steps in a row before the end, one after: three. A good one between starts anew."""
    config, run = bad_run
    resume = ["--checkpoint.resume", run / "checkpoints" / "step-00000006", "--checkpoint.every", 0]
    folder, errors = train_on(2, config, "--name", "third", *resume, bad=frozenset({7}), first=7)
    assert len(set(errors)) == 1, "all ranks give up alike"
    assert "not finite in 3 steps in a row, up to step 7 (train.max_bad_steps 3)" in errors[0]
    (last,) = read_metrics(folder)
    assert (last["step"], last["bad_steps"], last["grad_norm"]) == (7, 4, None)
    folder, errors = train_on(2, config, "--name", "later", *resume, bad=frozenset({8}), first=7)
    assert errors == ["", ""]
    assert [line["bad_steps"] for line in read_metrics(folder) if "loss" in line] == [3, 4]


def test_a_run_that_diverges_ends_with_code_1_and_one_message(config, capsys):
    """A learning rate at which the second step's weights are past what fp32 holds."""
    flags = ("--name", "diverged", "--train.lr", 1e38, "--train.warmup-steps", 0)
    assert train(config, *flags, "--train.max-bad-steps", 2) == 1
    error = capsys.readouterr().err
    assert error.count("moetrain: error: loss or gradient was not finite in 2 steps in a row") == 1
    assert "up to step 3 (train.max_bad_steps 2)" in error
    assert "Traceback" not in error
    run = config.parent / "runs" / "diverged"
    assert [line["bad_steps"] for line in read_metrics(run)] == [0, 1, 2]


def test_on_several_ranks_it_is_code_1_and_one_message_too(config):
    flags = "--name diverged-too --parallel.ep 2 --train.lr 1e38 --train.warmup-steps 0"
    with job(config.parent, 2, "train", config, *flags.split()) as running:
        ended = running.wait()
    assert (ended.code, ended.codes) == (1, [1, 1])
    assert ended.last_words.startswith(
        "moetrain: error: loss or gradient was not finite in 3 steps in a row"
    )
    assert "Traceback" not in ended.output + ended.last_words


# ---------------------------------------------------------------- refusals


def refused(capsys, config: Path, run: Path, *flags: object) -> str:
    """Train, expect exit code 2 and an untouched run; return the message."""
    before = snapshot(run)
    assert train(config, *flags) == 2
    assert snapshot(run) == before
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    assert "step 1/" not in out
    return err


def test_never_does_not_write_over_a_run(config, run, capsys):
    message = refused(capsys, config, run, "--checkpoint.resume", "never")
    assert "checkpoint.resume (never) would write over the run" in message
    assert "step-00000008" in message


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--seed", 1], "seed (1) was 0"),
        (["--data.seq-len", 16], "data.seq_len (16) was 32"),
        (["--seed", 1, "--data.seq-len", 16], "seed (1) was 0, data.seq_len (16) was 32"),
        (["--data.max-documents", 20], "data ("),
    ],
)
def test_another_order_of_samples_is_refused(config, run, capsys, flags, problem):
    message = refused(capsys, config, run, *flags)
    assert "cannot continue from" in message
    assert "step-00000008" in message
    assert problem in message


def test_other_text_is_refused(config, run, capsys, tmp_path):
    write_text(tmp_path / "text")
    (tmp_path / "text" / "00.txt").write_text("another document")
    message = refused(capsys, config, run, "--data.source", tmp_path / "text")
    assert "cannot continue from" in message


@pytest.mark.parametrize("name", ["step-00000007", "no-such-run"])
def test_a_checkpoint_that_is_not_there_is_no_fresh_start(config, run, capsys, name):
    path = run / "checkpoints" / name if name.startswith("step") else run.parent / name
    message = refused(capsys, config, run, "--checkpoint.resume", path)
    assert str(path) in message
    if name.startswith("step"):
        assert "step-00000006, step-00000008" in message


def test_a_checkpoint_of_another_model_lists_what_differs(config, run, capsys):
    message = refused(capsys, config, run, "--moe.experts", 8, "--moe.shared-experts", 1)
    assert "is of another model" in message
    lines = [line.strip() for line in message.splitlines()]
    wanted = "model.blocks.1.moe.experts.w_down: [4, 16, 16] float32 saved, [8, 16, 16]"
    assert any(line.startswith(wanted) for line in lines)
    assert any(
        line.startswith("model.blocks.1.feed_forward.w_down.weight: absent saved") for line in lines
    )
    assert not any("attention.wq" in line for line in lines)


def test_too_little_text_is_named(tmp_path, capsys):
    config = write_config(tmp_path, data={"seq_len": 4096})
    for path in sorted((tmp_path / "text").iterdir())[2:]:
        path.unlink()
    assert train(config, "--model.dim", 8) == 2
    assert "data.seq_len (4096) needs 4097 tokens" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "runs" / "run").iterdir()] == ["lock"]


def test_metrics_are_one_json_object_a_line(run):
    text = (run / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    assert all(isinstance(json.loads(line), dict) for line in text.splitlines())
