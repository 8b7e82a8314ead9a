"""Saving beside the training: what is saved is what was there when the save began."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from checkpoints import EXTRA, holds, is_same, logical, make_state, names_in

from moetrain import checkpoint
from moetrain.checkpoint import CheckpointError, Fragment, Saver, saver
from moetrain.checkpoint.snapshot import Snapshot
from moetrain.mesh import process_group
from moetrain.testing import simulate_ranks


@pytest.mark.parametrize(("edp", "ep"), [(1, 1), (2, 1), (1, 2), (2, 2), (8, 1)])
def test_a_snapshot_is_saved_as_the_tensors_were(tmp_path, edp, ep):
    """(8, 1): more ranks than rows, so that some hold nothing of a tensor."""

    def save() -> None:
        state = make_state(edp, ep, seed=1)
        snapshot = Snapshot()
        for _ in range(2):  # the second time into the same memory
            copies = snapshot.take(state)
        with torch.no_grad():
            for tensor in state.values():
                tensor.zero_()
        checkpoint.save(tmp_path, 100, copies, EXTRA)

    simulate_ranks(edp * ep, save)
    assert holds(checkpoint.latest(tmp_path), 1, 1, 2)


def test_a_snapshot_of_pieces_shares_no_memory():
    flat = torch.arange(7.0)
    taken = Snapshot().take({"moment": Fragment.of_flat((3, 4), 3, flat)})["moment"]
    assert isinstance(taken, Fragment)
    before = [(box, piece.clone()) for box, piece in taken.pieces]
    flat.zero_()
    assert [box for box, _ in before] == [
        box for box, _ in Fragment.of_flat((3, 4), 3, flat).pieces
    ]
    assert torch.cat([piece.flatten() for _, piece in before]).tolist() == list(range(7))


def make_saver(run: Path, keep: int = 2) -> Saver:
    return Saver(run, keep, asynchronous=True)


def test_training_goes_on_while_a_save_is_written(tmp_path, monkeypatch):
    """And changes the tensors right after the save began; a second save waits for the first."""
    may_write, begun = threading.Event(), []

    def late(*args) -> Path:
        begun.append(args[1])
        assert may_write.wait(20)
        return checkpoint.save(*args)

    monkeypatch.setattr(saver, "save", late)
    with process_group():
        state = make_state(1, 1, seed=1)
        made = make_saver(tmp_path, keep=1)
        made.save(100, state, EXTRA)
        with torch.no_grad():
            for tensor in state.values():
                tensor.zero_()
        assert list(made.outcomes()) == []
        assert checkpoint.latest(tmp_path) is None
        may_write.set()
        made.save(200, make_state(1, 1, seed=2), EXTRA)
        assert [outcome.step for outcome in made.outcomes()][:1] == [100]
        made.wait()
    assert begun == [100, 200]
    assert names_in(tmp_path) == ["step-00000200"]
    assert holds(checkpoint.latest(tmp_path), 2)


def test_what_changes_right_after_a_save_began_is_not_saved(tmp_path):
    with process_group():
        state, made = make_state(1, 1, seed=1), make_saver(tmp_path)
        made.save(100, state, EXTRA)
        with torch.no_grad():
            for tensor in state.values():
                tensor.zero_()
        made.wait()
    assert holds(checkpoint.latest(tmp_path), 1)


def test_a_save_that_fails_is_told_and_the_next_one_works(tmp_path):
    with process_group():
        state, made = make_state(1, 1, seed=1), make_saver(tmp_path)
        made.save(100, state, EXTRA)
        made.save(200, state, {"path": Path("which JSON cannot hold")})
        made.save(300, state, EXTRA)
        made.wait()
        outcomes = list(made.outcomes())
    assert [outcome.step for outcome in outcomes] == [100, 200, 300]
    assert isinstance(outcomes[1].error, CheckpointError)
    assert outcomes[0].error is outcomes[2].error is None
    assert names_in(tmp_path) == ["step-00000100", "step-00000300"]


def test_processes_save_beside_what_they_compute(tmp_path, ranks2):
    """Collectives of the save and of the training at the same time, on groups of their own."""
    assert ranks2.run(save_beside, tmp_path) == [True, True]
    assert holds(checkpoint.latest(tmp_path), 1, 2, 1)


def save_beside(run: Path) -> bool:
    made, state = make_saver(run), make_state(1, 2, seed=1)
    before = logical(state)
    for step in range(1, 6):
        made.save(step, state, EXTRA)
        for _ in range(50):
            torch.distributed.all_reduce(torch.ones(8))
    made.wait()
    return is_same(before, state) and all(error is None for _, error, _ in made.outcomes())
