"""What a run writes while it goes: lines by hand, by one rank, and whole whatever happens."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import VOCAB, small_config

from moetrain import report as module
from moetrain import settings
from moetrain.build import build_model
from moetrain.config import CheckpointConfig
from moetrain.mesh import Mesh
from moetrain.moe import Ledger
from moetrain.objective import Counts, LayerMeans, Means
from moetrain.optim import StepOutcome
from moetrain.report import Report
from moetrain.sinks import read_metrics
from moetrain.sizes import train_flops_per_token
from moetrain.spikes import Limits
from moetrain.step import Position, StepResult
from moetrain.testing import simulate_ranks

CONFIG = small_config(train={"steps": 4, "global_batch": 16})
STEP_TOKENS = 16 * 8
# 4 experts, 2 choices of 128 tokens: expert 0 is asked by all and keeps 60 of them.
OUTCOME_EKO = torch.zeros(4, 2, 4, dtype=torch.int64)
OUTCOME_EKO[0, 0, 0], OUTCOME_EKO[0, 0, 2] = 60, 68
OUTCOME_EKO[1, 1, 0] = 128
LEDGER = Ledger(
    OUTCOME_EKO, *map(torch.tensor, (2 * STEP_TOKENS, [60, 128, 0, 0], STEP_TOKENS, 0, 240))
)
LAYER = LayerMeans(LEDGER, 0.25, ((188, 0, 68, 0),))
MEANS = Means(2.5, 1.5, 0.5, (LAYER, LAYER), 64)
COUNTS = Counts(*map(torch.tensor, (STEP_TOKENS, STEP_TOKENS, 16)))


class Saved:
    """A tokenizer that notes where it was written."""

    def save(self, path: Path) -> None:
        path.write_text("tokenizer")


PREPARED: Any = SimpleNamespace(
    tokenizer=Saved(),
    manifest=SimpleNamespace(
        eval=SimpleNamespace(tokens=300, bytes=100), byte_entropy={"unigram": 2.0, "bigram": 1.0}
    ),
    chat=None,
)


@pytest.fixture(autouse=True)
def plotted(monkeypatch) -> list[tuple]:
    """Calls of the plots, which have tests of their own."""
    calls: list[tuple] = []
    monkeypatch.setattr(module, "write_plots", lambda *args: calls.append(args) or [])
    return calls


def opened(folder: Path, resume_step: int = 0, config=CONFIG) -> Report:
    model = build_model(config, VOCAB)
    return Report(config, folder, Mesh(torch.device("cpu")), PREPARED, model, Position(resume_step))


def done(
    step: int, bad_steps: int = 0, loss: float = 2.5, grad_norm: float = 3.0, spikes: int = 0
) -> tuple[Position, StepResult]:
    """A step and what came of it. It is skipped where its norm is not finite, or above 4."""
    limits = Limits(5.0, 4.0)
    outcome = StepOutcome(loss, grad_norm, not limits.admit(loss, grad_norm))
    result = StepResult([], COUNTS, None, outcome, limits, 0.25, 0.0, [1.25, 4.0], [])
    return Position(step, 16 * step, 128 * step, bad_steps, spikes=spikes), result


def alone(work) -> Any:
    return simulate_ranks(1, work)[0]


def test_lines_by_hand(tmp_path):
    def work():
        with opened(tmp_path) as report:
            for seconds in (0.5, 1.5):
                report.step_took(seconds, data_s=seconds / 4)
            report.train(*done(2), MEANS)
            report.step_took(4.0, data_s=0.5)
            report.train(*done(3, bad_steps=1), MEANS)
            report.evaluation(3, MEANS)

    alone(work)
    first, second, evaluation = read_metrics(tmp_path)
    given = {"step": 2, "tokens": 256, "loss": 2.5, "balance_loss": 1.5, "z_loss": 0.5}
    given |= {"grad_norm": 3.0, "lr": 0.25, "mfu": None, "token_drop_rate": 0.0}
    assert given.items() <= first.items()
    assert first["drop_rate"] == 68 / 256
    assert first["layers"][0]["load"] == [128, 128, 0, 0]
    assert first["layers"][0]["kept_load"] == [60, 128, 0, 0]
    assert first["layers"][0]["outcomes_by_rank"] == [[188, 0, 68, 0]]
    assert (first["dropped_gate_mass"], first["dead_experts"]) == (0.25, 4)
    assert (first["bad_steps"], second["bad_steps"]) == (0, 1)
    assert first["layers"][0]["effective_capacity_factor"] == 240 / 256
    assert [layer["capacity_factor"] for layer in first["layers"]] == [1.25, 4.0]
    # The mean of 0.5 s and 1.5 s, and after a line the count starts afresh.
    assert (first["step_time_s"], second["step_time_s"]) == (1.0, 4.0)
    assert (first["tokens_per_s"], second["tokens_per_s"]) == (128, 32)
    assert (first["data_s_by_rank"], second["data_s_by_rank"]) == ([0.25], [0.5])
    assert first["probe_s_by_rank"] == []
    flops = train_flops_per_token(build_model(CONFIG, VOCAB), seq_len=8)
    assert first["tflops_per_device"] == pytest.approx(flops * 128 / 1e12)
    assert evaluation == {
        "step": 3, "eval_loss": 2.5, "eval_nats_per_byte": 7.5, "eval_drop_rate": 68 / 256,
    }  # fmt: skip


def test_one_rank_writes_and_speed_is_that_of_all(tmp_path, capsys):
    def work():
        rank = torch.distributed.get_rank()
        with opened(tmp_path / str(rank)) as report:
            report.step_took(1.0, 0.0)
            report.train(*done(1), MEANS)
            report.evaluation(1, MEANS)
            report.saved(1, 0.5)
            report.finish()

    simulate_ranks(3, work)
    assert [path.name for path in tmp_path.iterdir()] == ["0"]
    assert len(read_metrics(tmp_path / "0")) == 2
    line = read_metrics(tmp_path / "0")[0]
    assert line["tokens_per_s"] == 128
    flops = train_flops_per_token(build_model(CONFIG, VOCAB), seq_len=8)
    assert line["tflops_per_device"] == pytest.approx(flops * 128 / 3 / 1e12)
    out = capsys.readouterr().out
    assert out.count("on 3 ranks (cpu, fp32), from the start") == 1
    assert out.count("checkpoint of step 1 saved") == 1


@pytest.mark.parametrize("has_instructions", [True, False])
@pytest.mark.parametrize(
    ("precision", "told", "warns"),
    [
        ("fp32", {True: "fp32", False: "fp32"}, False),
        ("bf16", {True: "bf16", False: "bf16"}, True),
        ("auto", {True: "bf16", False: "fp32"}, False),
    ],
)
def test_what_is_computed_in_is_told(
    tmp_path, capsys, monkeypatch, has_instructions, precision, told, warns
):
    monkeypatch.setattr("moetrain.precision.multiplies_bf16", lambda: has_instructions)
    monkeypatch.setattr(module, "multiplies_bf16", lambda: has_instructions)
    config = small_config(train={"steps": 4}, engine={"precision": precision})

    def work():
        with opened(tmp_path, config=config):
            pass

    alone(work)
    out = capsys.readouterr().out
    assert f"on 1 rank (cpu, {told[has_instructions]}), from the start" in out
    assert ("engine.precision (bf16) is not what" in out) is (warns and not has_instructions)


def test_the_folder_holds_what_it_takes_to_repeat_the_run(tmp_path, plotted):
    def work():
        with opened(tmp_path) as report:
            report.finish()

    alone(work)
    assert settings.load(tmp_path / "config.yaml") == CONFIG
    assert (tmp_path / "tokenizer.json").read_text() == "tokenizer"
    assert plotted == [(tmp_path, {"unigram": 2.0, "bigram": 1.0})]


@pytest.mark.parametrize(
    ("resume_step", "words"),
    [(0, "from the start"), (2, "from step 2"), (4, "already at step 4 of 4: nothing to train")],
)
def test_where_a_run_begins_and_what_it_keeps(tmp_path, capsys, resume_step, words):
    def work():
        with opened(tmp_path) as report:
            for step in range(1, 5):
                report.step_took(1.0, 0.0)
                report.train(*done(step), MEANS)
        capsys.readouterr()
        opened(tmp_path, resume_step).__exit__()

    alone(work)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, resume_step + 1))
    (line,) = capsys.readouterr().out.splitlines()
    counted = sum(p.numel() for p in build_model(CONFIG, VOCAB).parameters())
    assert line.startswith(f"{tmp_path}: {counted:,} parameters, ")
    assert line.endswith(words)


def test_lines_are_on_disk_at_once_and_stay_when_the_run_fails(tmp_path):
    def work():
        with opened(tmp_path) as report:
            report.step_took(1.0, 0.0)
            report.train(*done(1), MEANS)
            assert len(read_metrics(tmp_path)) == 1
            raise RuntimeError("the run fails")

    with pytest.raises(RuntimeError, match="the run fails"):
        alone(work)
    assert len(read_metrics(tmp_path)) == 1


def test_a_dense_run_has_lines_without_layers(tmp_path, capsys):
    def work():
        with opened(tmp_path, config=small_config(moe={"experts": 0})) as report:
            report.step_took(1.0, 0.0)
            position, result = done(1)
            dense = Means(2.5, 0.0, 0.0, (), 64)
            report.train(position, result._replace(capacity_factors=[]), dense)
            report.evaluation(1, dense)

    alone(work)
    line, _ = read_metrics(tmp_path)
    assert "drop" not in capsys.readouterr().out
    assert line["layers"] == []
    assert (line["drop_rate"], line["token_drop_rate"], line["max_vio"]) == (0, 0, 0)


def test_a_skipped_step_is_said_once_and_its_line_is_valid_json(tmp_path, capsys):
    nan = float("nan")
    spoilt = MEANS._replace(loss=nan, layers=(LAYER._replace(dropped_gate_mass=nan), LAYER))

    def work():
        with opened(tmp_path / str(torch.distributed.get_rank())) as report:
            report.step_took(1.0, 0.0)
            position, result = done(1, bad_steps=1, grad_norm=nan)
            report.went_wrong(1, result)
            report.train(position, result, spoilt)

    simulate_ranks(2, work)
    (line,) = read_metrics(tmp_path / "0")
    names = ["loss", "grad_norm", "dropped_gate_mass"]
    assert [line[name] for name in names] == [None] * 3
    assert (line["bad_steps"], line["drop_rate"]) == (1, 68 / 256)
    out = capsys.readouterr().out
    assert out.count("step 1 skipped: the gradient norm is nan") == 1
    assert out.count("1 skipped  ") == 1


def test_a_move_of_the_autopilot_is_said_once(tmp_path, capsys):
    def work():
        with opened(tmp_path / str(torch.distributed.get_rank())) as report:
            report.moved(16, "4.0 -> 3.0 in MoE layer 1")

    simulate_ranks(2, work)
    out = capsys.readouterr().out
    assert out.count("step 16: capacity factor 4.0 -> 3.0 in MoE layer 1\n") == 1


def test_a_spike_is_said_once_and_counted(tmp_path, capsys):
    def work():
        with opened(tmp_path / str(torch.distributed.get_rank())) as report:
            for step, spike in enumerate(({"grad_norm": 8.0}, {"loss": 7.0}, {}), start=1):
                report.step_took(1.0, 0.0)
                position, result = done(step, spikes=min(step, 2), **spike)
                if result.is_spike:
                    report.went_wrong(step, result)
                report.train(position, result, MEANS)

    simulate_ranks(2, work)
    lines = read_metrics(tmp_path / "0")
    assert [(line["spikes"], line["is_spike"]) for line in lines] == [
        (1, True), (2, True), (2, False),
    ]  # fmt: skip
    out = capsys.readouterr().out
    assert out.count("step 1 is a spike, skipped: gradient norm 8 (limit 4)") == 1
    assert out.count("step 2 is a spike, skipped: loss 7 (limit 5)") == 1
    assert out.count("2 spikes  ") == 2


def test_a_rank_that_is_slow_for_three_lines_is_named_once(tmp_path, capsys):
    def work():
        rank = torch.distributed.get_rank()
        with opened(tmp_path / str(rank)) as report:
            for step in range(1, 5):
                report.step_took(1.0, data_s=0.75 if rank == 2 else 0.125)
                report.train(*done(step), MEANS)
                if rank == 0:
                    said.append(capsys.readouterr().out.count("rank 2 is slow: it reads its "))

    said: list[int] = []
    simulate_ranks(3, work)
    assert said == [0, 0, 1, 0]
    (line, *_) = read_metrics(tmp_path / "0")
    assert line["step_time_s_by_rank"] == [1.0, 1.0, 1.0]
    assert line["data_s_by_rank"] == [0.125, 0.125, 0.75]
    assert len(line["probe_s_by_rank"]) == 3


@pytest.mark.parametrize(
    ("asynchronous", "grace_s", "said"),
    [
        (True, 10.0, ""),
        (True, 9.9, "a stop may take 10 s, for a step (4 s) and two saves (3 s)"),
        (False, 7.0, ""),
        (False, 6.9, "a stop may take 7 s, for a step (4 s) and a save (3 s)"),
        (True, 0.0, ""),
    ],
)
def test_a_stop_that_takes_longer_than_it_may_is_told_once(
    tmp_path, capsys, asynchronous: bool, grace_s: float, said: str
) -> None:
    saving = CheckpointConfig(every=1, asynchronous=asynchronous, grace_s=grace_s)

    def work() -> None:
        with opened(tmp_path, config=CONFIG.model_copy(update={"checkpoint": saving})) as report:
            report.step_took(4.0, 0.0)
            report.saved(1, 3.0)
            report.saved(2, 3.0)

    alone(work)
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("a stop may take") == bool(said)
    assert said in out
