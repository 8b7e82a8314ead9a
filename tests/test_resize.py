"""Experts cut, copied, joined and averaged: what the model computes, and what it holds then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import SMALL_RUN, model_of, read_metrics, save_model, train, write_start
from torch import Tensor, nn

from moetrain import checkpoint, restore, settings
from moetrain.build import build_model
from moetrain.cli import main
from moetrain.model import Transformer

E, F = 4, 16
WAYS = ["cut", "copy"]
UNDO = {"cut": "join", "copy": "average"}


def random_run(folder: Path, precision: str = "fp32", **moe: Any) -> Path:
    """A run whose model has random weights, routers that are sure of themselves, and biases."""
    sections = {name: SMALL_RUN[name] for name in ("model", "data")}
    sections["engine"] = {"precision": precision}
    shape = {"experts": E, "top_k": 2, "expert_ffn_dim": F, "first_dense": 1, "router": "topk"}
    factors = {"capacity_factor": None, "eval_capacity_factor": None}
    config = settings.resolve(None, {**sections, "moe": {**shape, **factors, **moe}})
    model = build_model(config, 257).to_empty(device="cpu")
    if precision == "fp64":
        model.double()
    generator = torch.Generator().manual_seed(0)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        scale = 2.0 if "router" in name else 0.3
        nn.init.normal_(tensor.data, std=scale, generator=generator)
    save_model(folder, config, model)
    return folder


def logits(model: Transformer) -> Tensor:
    tokens_BL = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens_BL, mode="eval").logits_BLV


def moe_of(run: Path) -> Any:
    return model_of(run).blocks[1].moe


GATES: list[dict[str, Any]] = [
    {"router": "topk"},
    {"router": "topk", "renormalize": False},
    {"router": "switch", "top_k": 1},
    {"router": "gshard"},
    {"router": "noisy_topk"},
    {"router": "dense", "top_k": E},
    {"router": "sigmoid", "gate_scale": 2.5, "expert_groups": 2, "top_groups": 2},
    # Full experts drop the same tokens.
    {"router": "topk", "eval_capacity_factor": 1.0},
]


@pytest.mark.parametrize("by", WAYS)
@pytest.mark.parametrize("moe", GATES, ids=lambda moe: "-".join(map(str, moe.values())))
def test_a_split_model_computes_the_same_and_a_merge_undoes_it(
    moe: dict[str, Any], by: str, tmp_path: Path
) -> None:
    run, more, fewer = random_run(tmp_path / "run", **moe), tmp_path / "more", tmp_path / "fewer"
    assert main(["split", str(run), str(more), "--parts", "4", "--by", by]) == 0
    found = restore.find(more).config
    assert (found.moe.experts, found.moe.top_k) == (4 * E, 4 * moe.get("top_k", 2))
    assert found.expert_ffn_dim == (F // 4 if by == "cut" else F)
    torch.testing.assert_close(logits(model_of(more)), logits(model_of(run)), rtol=1e-5, atol=1e-5)
    words = ["merge", str(more), str(fewer), "--parts", "4", "--by", UNDO[by]]
    assert main(words) == 0
    before, after = model_of(run).state_dict(), model_of(fewer).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("by", WAYS)
def test_equal_parts_become_what_they_are(by: str, tmp_path: Path) -> None:
    """Of eight, too, whose sum is rounded."""
    run, more, fewer = random_run(tmp_path / "run"), tmp_path / "more", tmp_path / "fewer"
    assert main(["split", str(run), str(more), "--parts", "8", "--by", by]) == 0
    assert main(["merge", str(more), str(fewer), "--parts", "8", "--by", UNDO[by]]) == 0
    before, after = model_of(run).state_dict(), model_of(fewer).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_model_in_fp64_stays_in_fp64(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", precision="fp64")
    assert main(["split", str(run), str(tmp_path / "more")]) == 0
    whole, cut = logits(model_of(run)), logits(model_of(tmp_path / "more"))
    torch.testing.assert_close(cut, whole, rtol=1e-13, atol=1e-13)
    assert cut.dtype == torch.float64


def test_a_token_that_is_dropped_is_dropped_by_every_part(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run", eval_capacity_factor=1.0)
    assert main(["split", str(run), str(tmp_path / "more")]) == 0
    tokens_BL = torch.randint(257, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        one, two = (
            model_of(path)(tokens_BL, mode="eval").layers[0].ledger
            for path in (run, tmp_path / "more")
        )
    assert one.outcome_EKO[..., 2].sum() > 0
    assert torch.equal(one.outcome_EKO.sum(1).repeat_interleave(2, dim=0), two.outcome_EKO.sum(1))


def test_parts_are_stretches_of_an_expert(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run")
    assert main(["split", str(run), str(tmp_path / "more"), "--parts", "2"]) == 0
    whole, cut = moe_of(run), moe_of(tmp_path / "more")
    for expert in range(2 * E):
        parent, first = expert // 2, expert % 2 * (F // 2)
        mine = slice(first, first + F // 2)
        gate, up = whole.experts.w_gate_up[parent].chunk(2, dim=1)
        wanted = torch.cat([gate[:, mine], up[:, mine]], dim=1)
        assert torch.equal(cut.experts.w_gate_up[expert], wanted)
        assert torch.equal(cut.experts.w_down[expert], 2 * whole.experts.w_down[parent, mine])
        assert torch.equal(cut.router.weight[expert], whole.router.weight[parent])


def test_an_average_is_one_of_all_numbers(tmp_path: Path) -> None:
    run = random_run(tmp_path / "run")
    words = ["merge", str(run), str(tmp_path / "fewer"), "--by", "average", "--top-k", "2"]
    assert main(words) == 0
    many, few = moe_of(run), moe_of(tmp_path / "fewer")
    assert few.gate.top_k == 2
    for name, tensor in few.named_parameters():
        wide = many.get_parameter(name)
        for expert in range(E // 2):
            mean = (wide[2 * expert] + wide[2 * expert + 1]) / 2
            torch.testing.assert_close(tensor[expert], mean, rtol=1e-6, atol=1e-7)


def test_training_goes_on_and_the_parts_part(tmp_path: Path) -> None:
    assert main(["split", str(random_run(tmp_path / "run")), str(tmp_path / "more")]) == 0
    saves = {"every": 2, "asynchronous": False}
    assert train(write_start(tmp_path, tmp_path / "more", checkpoint=saves)) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "runs" / "on") if "loss" in line]
    router = moe_of(tmp_path / "runs" / "on").router.weight
    assert not torch.equal(router[0], router[1])


def test_a_gate_of_fixed_choices_is_said_to_be_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = random_run(tmp_path / "run", router="gshard")
    assert main(["split", str(run), str(tmp_path / "more")]) == 0
    told = capsys.readouterr().err
    assert "moe.router (gshard) always has 2 choices; with 4 it is topk" in told
    assert "nothing drawn at random" in told


@pytest.mark.parametrize(
    ("moe", "words", "message"),
    [
        (
            {},
            ["split", "--parts", "3"],
            "moe.expert_ffn_dim (16) cannot be cut into 3 equal parts; try 2, 4, 8 or 16",
        ),
        ({}, ["split", "--parts", "1"], "--parts (1) must be 2 or more"),
        ({}, ["split", "--top-k", "0"], "--top-k (0) must be 1 or more"),
        (
            {},
            ["merge", "--parts", "3"],
            "moe.experts (4) must be divisible by --parts (3); try 2 or 4",
        ),
        ({}, ["merge", "--parts", "4"], "moe.top_k (2) is not divisible by --parts (4)"),
        ({}, ["merge", "--top-k", "3"], "moe.top_k (3) must not exceed moe.experts (2)"),
        ({"router": "hash"}, ["split"], "moe.router (hash) cannot choose among other experts"),
        ({"experts": 0}, ["merge", "--parts", "3"], "moe.experts (0) leaves nothing"),
        ({"experts": 0}, ["split", "--parts", "3"], "moe.experts (0) leaves nothing"),
    ],
)
def test_what_cannot_be_is_told_and_nothing_is_left(
    moe: dict[str, Any],
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = random_run(tmp_path / "run", **moe)
    command, *flags = words
    assert main([command, str(run), str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_checkpoint_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = random_run(tmp_path / "run")
    file = next((checkpoint.resolve(run)).glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert main(["split", str(run), str(tmp_path / "out")]) == 2
    assert "content differs from its SHA-256" in capsys.readouterr().err
