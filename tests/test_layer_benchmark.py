"""What the layer benchmark compares: the same choices everywhere, and the same results."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import layer  # noqa: E402
from contenders import limit, own, peers  # noqa: E402
from contenders.cell import Cell, Shape, choices, reference, tokens, useful_flops, weights  # noqa: E402
from contenders.report import fastest_peer, leanest_peer, report, useful_rate  # noqa: E402
from harness import Contender, Field  # noqa: E402

CPU = torch.device("cpu")
SHAPES = [layer.SHAPES[name] for name in ("e8", "e64")]
SMALL = Shape(64, 32, 8, 2)


# ---- what all of them get ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("routing", ["balanced", "zipf"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_linear_router_makes_the_choices_that_were_wanted(
    shape: Shape, routing: Any, dtype: str
) -> None:
    """In the dtype of the tokens as well as in fp32."""
    cell = Cell(shape, 256, routing, dtype, ranks=2)
    router_ED = weights(cell._replace(ranks=shape.experts), 0, CPU).router_ED
    for rank in range(2):
        x_TD, _, expert_TK = tokens(cell, rank, CPU)
        assert torch.equal(expert_TK, choices(cell)[rank * 128 :][:128])
        for as_dtype in (x_TD.dtype, torch.float32):
            logits_TE = x_TD.to(as_dtype) @ router_ED.to(as_dtype).T
            assert torch.equal(logits_TE.topk(shape.top_k, 1).indices, expert_TK)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_balanced_choices_are_even_on_every_rank(shape: Shape) -> None:
    for rank_TK in choices(Cell(shape, 256, "balanced", "bf16", ranks=2)).chunk(2):
        assert set(rank_TK.flatten().bincount().tolist()) == {128 * shape.top_k // shape.experts}
        assert all(len(set(row)) == shape.top_k for row in rank_TK.tolist())


def test_zipfs_first_choices_fall_as_one_over_the_rank() -> None:
    expert_TK = choices(Cell(SHAPES[0], 20_000, "zipf", "bf16"))
    assert all(len(set(row)) == 2 for row in expert_TK.tolist())
    share_E = expert_TK[:, 0].bincount() / 20_000
    law_E = 1 / torch.arange(1, 9)
    torch.testing.assert_close(share_E, law_E / law_E.sum(), rtol=0, atol=0.015)


def test_ranks_hold_parts_of_the_same_experts() -> None:
    cell = Cell(SMALL, 64, "balanced", "fp32")
    whole = weights(cell, 0, CPU)
    halves = [weights(cell._replace(ranks=2), rank, CPU) for rank in range(2)]
    assert torch.equal(torch.cat([half.gate_up_eDF for half in halves]), whole.gate_up_eDF)
    assert torch.equal(torch.cat([half.down_eFD for half in halves]), whole.down_eFD)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ranks": 3}, "ep 3 must divide the 8 experts"),
        ({"ranks": 0}, "ep 0 must divide the 8 experts"),
        ({"tokens": 100, "ranks": 2}, "tokens 100 must be a multiple of 8 "),
        ({"tokens": 0}, "tokens 0 must be a multiple of 4 "),
    ],
)
def test_a_cell_that_cannot_be_says_why(changes: dict[str, Any], words: str) -> None:
    problem = Cell(SMALL, 64, "balanced", "fp32")._replace(**changes).problem()
    assert problem is not None
    assert words in problem


# ---- the limit -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [*SHAPES, SMALL], ids=str)
def test_the_limit_does_what_is_counted_as_useful(shape: Shape) -> None:
    pairs = limit.products(Cell(shape, 64, "balanced", "bf16"), 0, CPU)
    done = sum(2 * one.numel() * other.shape[2] for one, other in pairs)
    assert done == useful_flops(shape, 64 * shape.top_k)


def test_every_way_computes_the_same_products() -> None:
    for pair in limit.products(Cell(SMALL, 64, "balanced", "fp32"), 0, CPU):
        wanted = torch.bmm(*pair)
        for way in limit.WAYS.values():
            found: Any = way(pair)
            found = torch.stack(found) if isinstance(found, list) else found.view_as(wanted)
            torch.testing.assert_close(found, wanted)


def test_memory_that_is_given_holds_every_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each right after it was computed."""
    monkeypatch.setattr(limit.dist, "get_rank", lambda: 0)
    given = limit.Given(Cell(SMALL, 64, "balanced", "fp32"), CPU)
    for pair, result in zip(given.products, given.results, strict=True):
        torch.bmm(*pair, out=result)
        assert torch.equal(result, torch.bmm(*pair))
    assert len(given.results) == 6


# ---- the layers ----------------------------------------------------------------------------------

BUILDS = (
    own.capacity,
    own.dropless,
    peers.deepspeed,
    peers.hugging_face_eager,
    peers.hugging_face_grouped,
)


class All:
    """All of them in one process, to spare the others' imports."""

    def __init__(self, cell: Cell, device: torch.device):
        self.cases = {build.__name__: build(cell, device) for build in BUILDS}

    def step(self) -> None:
        for case in self.cases.values():
            case.step()

    def facts(self) -> Any:
        return {name: case.facts() for name, case in self.cases.items()}


def test_layers_agree_with_the_reference_and_choose_what_was_wanted() -> None:
    with Field([Contender("all", All)]) as field:
        for shape, dtype in itertools.product((SMALL, Shape(64, 32, 16, 4)), ("fp32", "bf16")):
            cell = Cell(shape, 64, "balanced", dtype, is_checked=True)
            y_TD, x_grad_TD = reference(cell, CPU)
            answer: Any = field.build(cell)["all"]
            for name, facts in answer[0].items():
                assert (facts.kept, facts.is_as_wanted) == (64 * shape.top_k, True), name
                for found, wanted in ((facts.y_TD, y_TD), (facts.x_grad_TD, x_grad_TD)):
                    distance = (found.double() - wanted).norm() / wanted.norm()
                    assert distance < layer.TOLERANCE[dtype], name
        uneven = Cell(SMALL, 64, "zipf", "fp32")
        answer = field.build(uneven)["all"]
        kept = {name: facts.kept for name, facts in answer[0].items()}
        load_E = choices(uneven).flatten().bincount(minlength=8)
        assert kept["capacity"] == kept["deepspeed"] == load_E.clamp(max=20).sum()  # 1.25·64·2/8
        assert kept["dropless"] == kept["hugging_face_eager"] == 128
        answer = field.build(Cell(SMALL, 64, "balanced", "fp32"))["all"]
        check_executed({name: facts.executed for name, facts in answer[0].items()})


def check_executed(flops: dict[str, int]) -> None:
    """Those of the router and of all rows that are multiplied: in fp32 we multiply filled rows
    alone, DeepSpeed multiplies all slots, and a little besides."""
    tokens, (dim, expert_dim, experts, top_k) = 64, SMALL
    router, row = 3 * 2 * tokens * dim * experts, 3 * 3 * 2 * dim * expert_dim
    rows = {name: (executed - router) / row for name, executed in flops.items()}
    slots = experts * 20  # 1.25·64·2/8 each
    assert slots <= rows.pop("deepspeed") < slots + 1
    assert set(rows.values()) == {tokens * top_k}


# ---- the report ----------------------------------------------------------------------------------


def entry(seconds: list[float], flops: int = 100, **changes: Any) -> dict[str, Any]:
    plain = {"kept": 10, "assigned": 10, "peak_bytes": 2**20, "remark": "", "wrong": None}
    return {"seconds": seconds, "flops": flops, "executed": 2 * flops, **plain, **changes}


SYSTEMS = {
    "limit": entry([1.0, 2.0], remark="bmm"),
    "moetrain": entry([2.0, 2.0], flops=50, kept=5),
    "DeepSpeed": entry([4.0, 5.0], peak_bytes=3 * 2**20),
    "torchtitan": entry([0.5, 0.5], peak_bytes=1, wrong="0.1 away from the reference"),
    "Mixtral eager": {"absent": "no such package"},
}


def test_rates_are_per_useful_flop() -> None:
    assert useful_rate(SYSTEMS, "moetrain", "limit") == (0.375, 0.25, 0.5)


def test_a_peer_that_computes_something_else_is_shown_and_not_ranked() -> None:
    assert fastest_peer(SYSTEMS) == leanest_peer(SYSTEMS) == "DeepSpeed"
    asked = Cell(SMALL, 64, "zipf", "fp32")
    cell = {**asked._asdict(), "shape": asked.shape._asdict()}
    where = {
        "command": "python benchmarks/layer.py",
        "date": "2026-01-02",
        "commit": "abc",
        "processor": "a chip",
        "instructions": "avx2",
        "cores": 2,
    }
    operators = [{"name": "aten::mm", "share": 0.5, "calls": 3.0}]
    text = report([{"cell": cell, **where, "systems": SYSTEMS, "profiles": {"limit": operators}}])
    where_told = "`python benchmarks/layer.py`, 2 rounds, 2026-01-02, commit abc, 2 cores of a chip"
    assert f"{where_told} (avx2)." in text
    assert "Where limit spends its time:" in text
    assert "| `aten::mm` | 50.0% | 3 |" in text
    assert "| torchtitan | not ranked | not ranked | 2.00 | 0 | 0.0% |" in text
    assert "- torchtitan: 0.1 away from the reference." in text
    assert "- Mixtral eager: no such package." in text


def test_a_layer_that_computes_something_else_leaves_its_columns_empty() -> None:
    asked = Cell(SMALL, 64, "zipf", "fp32")
    systems = {
        **SYSTEMS,
        "moetrain": entry([1.0, 1.0], wrong="0.1 away from the reference"),
        "moetrain dropless": entry([2.0, 2.0]),
    }
    where = {"date": "", "commit": "", "processor": "", "instructions": "avx2", "cores": 2}
    cell = {**asked._asdict(), "shape": asked.shape._asdict()}
    text = report([{"cell": cell, **where, "systems": systems}])
    assert "| avx2 | – | **0.75 (0.50–1.00)** | DeepSpeed | – | 2.25 (2.00–2.50) |" in text


def test_a_gpu_is_held_to_a_large_product_and_told_in_absolute_figures() -> None:
    asked = Cell(layer.SHAPES["olmoe"], 16_384, "balanced", "bf16")
    systems = {
        **{name: entry([0.001, 0.001], flops=10**11) for name in ("limit", "large product")},
        "moetrain": entry([0.001, 0.001], flops=3 * 10**10),
        "moetrain dropless": entry([0.001, 0.001], flops=5 * 10**10),
        "DeepSpeed": entry([0.001, 0.001], flops=4 * 10**10),
    }
    where = {"date": "2026-01-02", "commit": "abc", "gpu": "a GPU", "instructions": "", "cores": 2}
    cell = {**asked._asdict(), "shape": asked.shape._asdict()}
    text = report([{"cell": cell, **where, "processor": "a chip", "systems": systems}])
    assert "| a GPU | **0.30 (0.30–0.30)** | 0.50 (0.50–0.50) | DeepSpeed | **0.75" in text
    assert "| moetrain dropless | 1.00 | 50 | 0.50 (0.50–0.50) | 1.67" in text


def test_cells_that_are_measured_again_on_such_a_machine_replace_those_before() -> None:
    def seen(tokens: int, instructions: str) -> dict[str, Any]:
        return {"cell": {"tokens": tokens}, "instructions": instructions}

    before = [seen(1, "avx2"), seen(1, "amx_bf16"), seen(2, "avx2")]
    found = [seen(1, "avx2") | {"again": True}]
    assert layer.join(before, found) == [*before[1:], *found]
