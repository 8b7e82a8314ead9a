"""Axes, sums, the life of a process group, and one rank's work agreed on by all."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from moetrain.errors import UserError
from moetrain.mesh import Mesh, on_first_local_rank, process_group, rank_and_world, require_same
from moetrain.testing import run_ranks, simulate_ranks


def axes(ep: int, dp_replicate: int) -> dict[str, list[int]]:
    """The ranks beside this one along every axis."""
    mesh = Mesh(torch.device("cpu"), ep, dp_replicate)
    return {
        "dense": mesh.dense.mesh.tolist(),
        "same_experts": mesh.same_experts.mesh.tolist(),
        "ep": dist.get_process_group_ranks(mesh.expert_parallel.get_group()),
    }


def test_expert_ranks_are_adjacent_and_same_experts_are_ep_apart():
    results = simulate_ranks(8, axes, 4, 1)
    for rank, found in enumerate(results):
        assert found["dense"] == list(range(8))
        assert found["ep"] == list(range(rank // 4 * 4, rank // 4 * 4 + 4))
        assert found["same_experts"] == [rank % 4, rank % 4 + 4]


def test_replicas_are_the_outermost_axis():
    results = simulate_ranks(8, axes, 2, 2)
    for rank, found in enumerate(results):
        assert found["dense"] == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert found["ep"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert found["same_experts"] == [[rank % 2, rank % 2 + 2], [rank % 2 + 4, rank % 2 + 6]]


def test_a_world_that_is_no_product_is_a_bug_of_the_caller():
    with pytest.raises(AssertionError, match="check_world"):
        simulate_ranks(3, axes, 2, 1)


def test_sum_leaves_its_argument_alone_and_the_graph_out():
    def of_rank():
        mine = torch.tensor([1.0, dist.get_rank()], requires_grad=True)
        total = Mesh(torch.device("cpu")).sum(mine)
        return mine.tolist(), total.tolist(), total.requires_grad

    expected = [([1.0, rank], [3.0, 3.0], False) for rank in range(3)]
    assert simulate_ranks(3, of_rank) == expected


# ---------------------------------------------------------------- life of a process group


@pytest.fixture
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_launcher")
def test_without_a_launcher_there_is_one_rank_and_nothing_is_left_behind():
    assert rank_and_world() == (0, 1)
    for _ in range(2):
        with process_group() as device:
            assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
            assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        assert not dist.is_initialized()


@pytest.mark.usefixtures("_no_launcher")
def test_an_error_inside_ends_the_group_too():
    with pytest.raises(UserError, match="mend me"), process_group():
        raise UserError("mend me")
    assert not dist.is_initialized()


def test_the_launcher_says_rank_and_world(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert rank_and_world() == (3, 8)


# ---------------------------------------------------------------- one rank first


def first_then_others(local_ranks: list[int], log: str, failing: tuple[int, ...]) -> str:
    """Work that notes who ran and in which order; returns the result or the error."""
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(local_ranks[rank])

    def work() -> str:
        with open(log, "a") as file:
            file.write(f"{rank} ")
        if rank in failing:
            raise UserError(f"rank {rank} has no disk")
        return f"done by {rank}"

    try:
        return on_first_local_rank(work)
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def test_the_first_rank_of_a_machine_works_before_the_others(ranks2, tmp_path):
    log = tmp_path / "log"
    assert ranks2.run(first_then_others, [1, 0], str(log), ()) == ["done by 0", "done by 1"]
    assert log.read_text() == "1 0 "


def test_every_machine_has_a_first_rank(ranks2, tmp_path):
    log = tmp_path / "log"
    assert ranks2.run(first_then_others, [0, 0], str(log), ()) == ["done by 0", "done by 1"]
    assert sorted(log.read_text().split()) == ["0", "1"]


@pytest.mark.parametrize(
    ("failing", "ran"),
    [((0,), ["0"]), ((1,), ["0", "1"]), ((0, 1), ["0"])],
)
def test_an_error_of_one_rank_is_the_same_error_on_all(ranks2, tmp_path, failing, ran):
    log = tmp_path / "log"
    answers = ranks2.run(first_then_others, [0, 1], str(log), failing, timeout=20)
    assert answers == [f"UserError: rank {failing[0]} has no disk"] * 2
    assert log.read_text().split() == ran


def stumble() -> None:
    os.environ["LOCAL_RANK"] = str(dist.get_rank())

    def work() -> None:
        if dist.get_rank() == 0:
            raise RuntimeError("not the user's fault")

    on_first_local_rank(work)


def test_any_other_error_is_raised_as_it_is():
    with pytest.raises(RuntimeError, match="not the user's fault"):
        run_ranks(2, stumble, timeout=20)


def wait_for_a_slow_rank() -> str:
    rank = dist.get_rank()
    os.environ["LOCAL_RANK"] = str(rank)
    try:
        on_first_local_rank(lambda: time.sleep(2.5 * (1 - rank)), within=timedelta(seconds=1))
    except RuntimeError as error:
        return str(error)
    return "done"


def test_the_others_wait_as_long_as_they_are_told():
    slow, waiting = run_ranks(2, wait_for_a_slow_rank, timeout=20)
    assert "imed out" in waiting
    assert slow != "done"


@pytest.mark.parametrize("odd", [0, 1, 3])
def test_a_rank_that_differs_is_named_to_all(odd):
    def of_rank() -> str:
        try:
            require_same("the text", "theirs" if dist.get_rank() == odd else "ours", "copy it")
        except UserError as error:
            return str(error)
        return "same"

    answers = simulate_ranks(4, of_rank)
    assert answers == [f"the text of rank {odd or 1} is not that of rank 0; copy it"] * 4


def test_ranks_that_agree_go_on():
    assert simulate_ranks(3, require_same, "the text", "ours", "copy it") == [None] * 3
