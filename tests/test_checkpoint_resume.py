"""Where a run begins: what `checkpoint.resume` means at its first start, and when started again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from checkpoints import is_same, make_state
from runs import train, write_config

from moetrain import checkpoint, resume
from moetrain.config import CheckpointConfig, Config, MoEConfig
from moetrain.errors import UserError
from moetrain.resume import began_with, is_restart, load_start
from moetrain.testing import simulate_ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": ""}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "SLURM_RESTART_COUNT": "2"}, True),
    ],
)
def test_agent_and_queue_count_restarts(environment, expected):
    assert is_restart(environment) == expected


def test_a_restart_that_one_rank_counted_is_one_of_all(monkeypatch):
    is_counted = []
    monkeypatch.setattr(resume, "is_restart", lambda environment: dist.get_rank() in is_counted)
    assert simulate_ranks(3, resume.started_again) == [False] * 3
    is_counted.append(1)
    assert simulate_ranks(3, resume.started_again) == [True] * 3


def test_a_checkpoint_tells_what_its_run_was_told():
    extra = {"config": {"checkpoint": {"resume": "a/b"}}}
    assert began_with("a/b", extra)
    assert not began_with("never", extra)


def config_of(told: str, hash_limit_gib: float = 1, **moe: Any) -> Config:
    told_and_limit = CheckpointConfig(resume=told, hash_limit_gib=hash_limit_gib)
    return Config(checkpoint=told_and_limit, moe=MoEConfig(**moe))


def save_as(run: Path, step: int, told: str, **moe: Any) -> Path:
    """Save make_state(step) as a run does that was told to resume so."""
    extra = {"config": config_of(told, **moe).model_dump(mode="json")}
    return simulate_ranks(1, lambda: checkpoint.save(run, step, make_state(1, 1, step), extra))[0]


def start(run: Path, told: str, restarted: bool, **settings: Any) -> int | None:
    """The step of the checkpoint that such a run begins with, once it is loaded."""

    def begin() -> int | None:
        state = make_state(1, 1, 0)
        found = load_start(config_of(told, **settings), run, state, restarted)
        if found is None:
            return None
        step = int(found[0].name.removeprefix("step-"))
        assert is_same(state, make_state(1, 1, step))
        return step

    return simulate_ranks(1, begin)[0]


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """The checkpoint of another run."""
    return save_as(tmp_path / "elsewhere", 7, "auto")


def test_a_path_is_where_the_first_start_begins_and_no_later_one(tmp_path, elsewhere):
    run, path = tmp_path / "run", str(elsewhere)
    assert start(run, path, restarted=True) == 7
    save_as(run, 9, "auto")
    save_as(run, 8, path)
    assert start(run, path, restarted=False) == 7
    assert start(run, path, restarted=True) == 8
    assert start(run, "auto", restarted=True) == 8
    save_as(run, 9, path)
    assert start(run, path, restarted=True) == 9


def test_never_refuses_what_an_earlier_run_left_and_keeps_what_this_one_saved(tmp_path):
    run = tmp_path / "run"
    assert start(run, "never", restarted=False) is None
    assert start(run, "never", restarted=True) is None
    save_as(run, 1, "auto")
    for restarted in (False, True):
        with pytest.raises(UserError, match=r"resume \(never\) would write over .* step-00000001"):
            start(run, "never", restarted)
    save_as(run, 2, "never")
    assert start(run, "never", restarted=True) == 2
    with pytest.raises(UserError, match="would write over"):
        start(run, "never", restarted=False)


def test_a_restart_passes_over_damage_but_never_loses_everything(tmp_path, elsewhere, recwarn):
    run, path = tmp_path / "run", str(elsewhere)
    first, second = save_as(run, 1, path), save_as(run, 2, path)
    (second / "__0_0.distcp").unlink()
    assert start(run, path, restarted=True) == 1
    assert str(recwarn[0].message).startswith("step-00000002 is passed over")
    (first / "__0_0.distcp").unlink()
    with pytest.raises(UserError, match=r"all checkpoints of .* are damaged \(2, see warnings\)"):
        start(run, path, restarted=True)


def test_how_much_is_verified_is_a_setting(tmp_path, elsewhere, recwarn):
    save_as(tmp_path / "run", 8, "auto")
    assert start(tmp_path / "run", "auto", restarted=False, hash_limit_gib=0) == 8
    assert start(tmp_path / "run", str(elsewhere), restarted=False, hash_limit_gib=0) == 7
    limits = [str(warning.message) for warning in recwarn]
    assert len(limits) == 2
    assert all("is above checkpoint.hash_limit_gib (0)" in limit for limit in limits)


def test_another_computation_of_the_same_shapes_is_a_warning(tmp_path, recwarn):
    save_as(tmp_path, 1, "auto", capacity_factor=1.0)
    assert start(tmp_path, "auto", restarted=False, capacity_factor=1.0) == 1
    assert not recwarn
    assert start(tmp_path, "auto", restarted=False, router="gshard") == 1
    assert [str(warning.message) for warning in recwarn] == [
        "step-00000001 continues with moe.router (gshard) was topk, "
        "moe.capacity_factor (1.25) was 1.0"
    ]


def test_training_that_is_started_again_goes_on(tmp_path, monkeypatch, capsys):
    config = write_config(tmp_path, checkpoint={"every": 2}, eval={"every": 0})
    assert train(config, "--train.steps", 2) == 0
    command = [config, "--name", "branch", "--checkpoint.resume", tmp_path / "runs" / "run"]
    assert train(*command, "--train.steps", 4) == 0
    capsys.readouterr()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert train(*command, "--train.steps", 4) == 0
    assert "already at step 4 of 4" in capsys.readouterr().out
