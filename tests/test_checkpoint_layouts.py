"""Checkpoints: what is saved is what is loaded, in any layout, into the same model alone."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkpoints import EXTRA, FILES, holds, is_same, logical, make_state, names_in, save
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from moetrain import checkpoint
from moetrain.checkpoint import CheckpointError
from moetrain.checkpoint.manifest import MANIFEST, MARKER
from moetrain.errors import UserError
from moetrain.testing import simulate_ranks


@pytest.mark.parametrize(("edp", "ep"), [(1, 1), (2, 1), (1, 2), (1, 4), (2, 2), (4, 2), (8, 1)])
def test_every_layout_loads_the_same_values(saved_once, edp, ep):
    assert holds(checkpoint.latest(saved_once), 1, edp, ep)


@pytest.mark.parametrize(("edp", "ep"), [(1, 1), (2, 2), (8, 1)])
def test_every_layout_saves_the_same_values(tmp_path, edp, ep):
    # (8, 1): more ranks than rows or columns, so that some own nothing of a tensor.
    assert holds(save(tmp_path, 5, seed=3, edp=edp, ep=ep), 3, 1, 2)


def make_model() -> tuple[torch.optim.Optimizer, dict[str, torch.Tensor]]:
    """A layer sharded over all ranks, and every tensor of it and its optimizer by name."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = fully_shard(nn.Linear(5, 6, dtype=torch.float64), mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    tensors: dict[str, torch.Tensor] = {}
    for name, p in model.named_parameters():
        moments = {key: torch.zeros_like(p) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        tensors[f"model.{name}"] = p
        tensors |= {f"optimizer.{name}.{key}": t for key, t in optimizer.state[p].items()}
    return optimizer, tensors


def ramp(like: torch.Tensor, end: float) -> torch.Tensor:
    """A DTensor whose logical values do not depend on the layout."""
    assert isinstance(like, DTensor)
    full = torch.linspace(-1, end, like.numel(), dtype=like.dtype).view(like.shape)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def take_step(optimizer: torch.optim.Optimizer) -> None:
    for number, p in enumerate(optimizer.param_groups[0]["params"]):
        p.grad = ramp(p, end=number)
    optimizer.step()


def test_a_sharded_model_continues_in_another_world(tmp_path):
    """Weights and AdamW's state move from 2 ranks to 4, and the next step is the same."""

    def interrupted() -> dict[str, torch.Tensor]:
        optimizer, tensors = make_model()
        with torch.no_grad():
            for p in optimizer.param_groups[0]["params"]:
                p.copy_(ramp(p, end=2))
        take_step(optimizer)
        checkpoint.save(tmp_path, 1, tensors, {})
        take_step(optimizer)
        return logical(tensors)

    def resumed() -> dict[str, torch.Tensor]:
        optimizer, tensors = make_model()
        assert checkpoint.load_latest(tmp_path, tensors) is not None
        take_step(optimizer)
        return logical(tensors)

    before, after = simulate_ranks(2, interrupted)[0], simulate_ranks(4, resumed)[3]
    assert before["optimizer.weight.step"] == 2
    assert before["optimizer.weight.exp_avg"].any()
    assert is_same(before, after)


def test_a_prefix_loads_that_part_alone(saved):
    def weights() -> bool:
        part = {n: t for n, t in make_state(1, 2, 9).items() if n.startswith("model.")}
        checkpoint.load(saved, part, prefix="model.")
        return is_same(part, {n: t for n, t in make_state(1, 2, 1).items() if n in part})

    assert simulate_ranks(2, weights) == [True, True]


def test_manifest_tells_what_there_is(saved):
    manifest = checkpoint.read_manifest(saved)
    assert (manifest.version, manifest.step, manifest.extra) == (1, 100, EXTRA)
    assert {file.name for file in manifest.files} == {*FILES} - {MANIFEST, MARKER}
    experts = manifest.tensors["model.experts.up"]
    assert (experts.shape, experts.dtype) == ([4, 6, 3], "float32")
    assert [piece.sizes for piece in experts.pieces] == [[2, 6, 3]] * 2
    assert manifest.tensors["optimizer.experts.up.step"].shape == []
    assert str(manifest.tensors["model.norm"]) == "[3] bfloat16"


def test_extra_that_json_cannot_hold_is_an_error_and_leaves_nothing(saved_run):
    with pytest.raises(CheckpointError, match="rank 0: ValidationError"):
        save(saved_run, 200, seed=2, edp=2, extra={"path": Path("x")})
    assert names_in(saved_run) == ["step-00000100"]


# ---- another model


def test_every_difference_is_listed_and_nothing_is_touched(saved):
    def attempt() -> tuple[str, bool]:
        state = make_state(1, 2, 9)
        del state["counts"]
        state["model.norm"] = torch.zeros(3)
        state["model.router"] = torch.zeros(5, 8, dtype=torch.float64)
        state["model.bias"] = torch.zeros(2)
        before = logical(state)
        with pytest.raises(UserError) as caught:
            checkpoint.load(saved, state)
        return str(caught.value), is_same(before, state)

    for message, is_untouched in simulate_ranks(2, attempt):
        assert is_untouched
        assert message.splitlines() == [
            f"{saved} is of another model, 4 tensors differ:",
            "  counts: [5] int64 saved, absent wanted",
            "  model.bias: absent saved, [2] float32 wanted",
            "  model.norm: [3] bfloat16 saved, [3] float32 wanted",
            "  model.router: [5, 4] float64 saved, [5, 8] float64 wanted",
        ]


def test_settings_that_change_shapes_are_named_first(tmp_path):
    saved = {"moe": {"experts": 4, "new": 1}, "model": {"dim": 8}, "train": {"lr": 0.1}}
    own = {"moe": {"experts": 8}, "model": {"dim": 8, "old": 1}, "train": {"lr": 0.2}}
    path = save(tmp_path, 1, seed=1, extra={"config": saved})
    with pytest.raises(UserError) as caught:
        simulate_ranks(1, lambda: checkpoint.load(path, {"counts": torch.zeros(1)}, config=own))
    assert str(caught.value).splitlines()[:3] == [
        f"{path} is of another model, 7 tensors differ:",
        "  moe.experts (8) was 4",
        "  counts: [5] int64 saved, [1] float32 wanted",
    ]


def test_weights_alone_are_not_enough_to_train(tmp_path):
    weights = {"model.norm": torch.ones(3)}
    moments = {"optimizer.norm.exp_avg": torch.ones(3), "optimizer.norm.step": torch.tensor(1.0)}
    path = simulate_ranks(1, lambda: checkpoint.save(tmp_path, 1, weights, {}))[0]
    with pytest.raises(UserError) as caught:
        simulate_ranks(1, lambda: checkpoint.load(path, weights | moments))
    assert str(caught.value).splitlines() == [
        f"{path} holds weights alone, and to train needs 2 tensors more:",
        "  optimizer.norm.exp_avg: absent saved, [3] float32 wanted",
        "  optimizer.norm.step: absent saved, [] float32 wanted",
    ]
