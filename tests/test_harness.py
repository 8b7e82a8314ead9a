"""How benchmarks measure: contenders in processes of their own, which take turns."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import harness  # noqa: E402
import operators  # noqa: E402
from harness import AbsentError, Contender, Field, ratio, spread, turns  # noqa: E402

MIB = 2**20


class Job(NamedTuple):
    """A cell: what all contenders but those named do is allocate, and note that they did."""

    notes: str = os.devnull
    mib: int = 1
    absent: str = ""
    dead: str = ""
    stuck: str = ""
    broken: str = ""


class Allocates:
    def __init__(self, name: str, job: Job, _device: torch.device):
        if name == job.absent:
            raise AbsentError("not today")
        if name == job.dead and dist.get_rank() == dist.get_world_size() - 1:
            os._exit(1)
        if name == job.stuck:
            time.sleep(600)  # as one that waits for an answer of the dead
        if name == job.broken:
            raise ZeroDivisionError(name)
        self.name, self.job = name, job

    def step(self) -> None:
        torch.ones(self.job.mib * MIB, dtype=torch.int8)
        if dist.get_rank() == 0:
            with Path(self.job.notes).open("a") as notes:
                notes.write(self.name)

    def facts(self) -> tuple[int, int]:
        return dist.get_rank(), dist.get_world_size()


def contender(name: str, ranks: int = 1) -> Contender:
    return Contender(name, partial(Allocates, name), ranks)


@pytest.fixture(scope="module")
def field() -> Iterator[Field]:
    with Field([contender("a"), contender("b", ranks=2)]) as field:
        yield field


def test_contenders_take_turns_and_another_one_begins_each_round(
    field: Field, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    assert field.build(Job(str(notes))) == {"a": [(0, 1)], "b": [(0, 2), (1, 2)]}
    samples = field.measure(3, turn_s=0)
    warming, rounds, memory = "ab", "abbaba", "ab"
    assert notes.read_text() == warming + rounds + memory
    assert [len(sample.seconds) for sample in samples.values()] == [3, 3]
    assert field.facts() == {"a": [(0, 1)], "b": [(0, 2), (1, 2)]}


def test_everyone_follows_everyone_in_turn() -> None:
    orders = ["".join(turns("abc", number)) for number in range(6)]
    assert sorted(orders) == sorted(map("".join, permutations("abc")))


def test_rounds_end_when_they_have_taken_long_enough(field: Field) -> None:
    field.build(Job())
    samples = field.measure(9, turn_s=0, enough_s=0, least=2)
    assert [len(sample.seconds) for sample in samples.values()] == [2, 2]


def test_the_memory_of_a_step_is_that_of_all_ranks(field: Field) -> None:
    field.build(Job(mib=64))
    samples = field.measure(1, turn_s=0)
    for name, ranks in (("a", 1), ("b", 2)):
        assert abs(samples[name].peak_bytes / MIB / ranks - 64) < 2  # Linux counts in batches


def test_who_cannot_take_part_is_left_out_with_a_reason(field: Field) -> None:
    answers = field.build(Job(absent="b"))
    assert str(answers["b"]) == "not today"
    assert list(field.measure(1, turn_s=0)) == ["a"]


def test_an_error_is_told_with_its_place(field: Field) -> None:
    with pytest.raises(RuntimeError, match=r"a, rank 0, asked to build:(.|\n)*ZeroDivisionError"):
        field.build(Job(broken="a"))


def test_a_process_that_dies_is_named() -> None:
    with (
        Field([contender("a")]) as field,
        pytest.raises(RuntimeError, match="a: rank 0 died while asked to build"),
    ):
        field.build(Job(dead="a"))


def test_a_rank_that_dies_is_named_while_another_waits_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(harness, "GRACE_S", 0.1)
    with (
        Field([contender("a", ranks=2)]) as field,
        pytest.raises(RuntimeError, match="a: rank 1 died while asked to build"),
    ):
        field.build(Job(dead="a", stuck="a"))


def test_a_process_that_dies_between_turns_is_named() -> None:
    others = set(multiprocessing.active_children())
    with Field([contender("a")]) as field:
        field.build(Job())
        (process,) = set(multiprocessing.active_children()) - others
        process.kill()
        process.join()
        with pytest.raises(RuntimeError, match="a: rank 0 died before it was asked to turn"):
            field.measure(1, turn_s=0)


def test_where_little_memory_is_left_the_others_rest_and_warm_up_again(
    field: Field, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "SCARCE", 1.1)  # of this process: those of the contenders have 0.6
    notes = tmp_path / "notes"
    field.build(Job(str(notes)))
    field.measure(1, turn_s=0)
    warming, rounds, memory = "abb", "aabb", "ab"
    assert notes.read_text() == warming + rounds + memory


def test_cases_that_are_let_go_have_no_turns(field: Field) -> None:
    field.build(Job())
    field.clear()
    assert field.measure(1, turn_s=0) == {}
    assert field.build(Job())["a"] == [(0, 1)]


def test_ratios_are_those_within_a_round() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    assert ratio([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]) == (3.0, 2.0, 4.0)
    assert ratio([2.0, 8.0, 9.0], [1.0, 2.0, 3.0]).show() == "3.00 (2.00–4.00)"


class Products:
    """A step of two matrix products and a sum."""

    def __init__(self, size: int, device: torch.device):
        self.matrix = torch.randn(size, size, device=device)

    def step(self) -> None:
        (self.matrix @ self.matrix @ self.matrix).sum()

    def facts(self) -> None:
        """None that count."""


def test_operators_of_a_step_and_their_table() -> None:
    profiled = operators.Profiled(Products, 256, torch.device("cpu"))
    profiled.step()
    found = profiled.facts()
    assert sum(operator["share"] for operator in found) == pytest.approx(1, abs=0.02)
    first = found[0]
    assert (first["name"], first["calls"]) == ("aten::mm", 2)
    assert first["share"] > 0.5
    shown = operators.table(found).splitlines()
    assert shown[2] == f"| `aten::mm` | {first['share']:.1%} | 2 |"
    assert len(shown) == 2 + min(len(found), operators.SHOWN)
