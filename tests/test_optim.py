"""The schedule at points worked out by hand, AdamW against torch's, the norm of sharded grads."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from moetrain.optim import adamw, global_grad_norm, lr_at, scale_grads
from moetrain.testing import simulate_ranks

# ---------------------------------------------------------------- schedule


def cosine(step: int, **changes) -> float:
    plan = {"steps": 110, "peak": 2.0, "min_ratio": 0.1, "warmup_steps": 10, **changes}
    return lr_at(step, schedule="cosine", decay_fraction=0.2, **plan)


def wsd(step: int, **changes) -> float:
    plan = {"steps": 100, "peak": 2.0, "min_ratio": 0.1, "warmup_steps": 10, **changes}
    plan.setdefault("decay_fraction", 0.2)
    return lr_at(step, schedule="wsd", **plan)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (1, 0.2),  # the first of ten steps of warm-up
        (5, 1.0),
        (10, 2.0),  # the peak
        (35, 2.0 * (0.1 + 0.9 * (0.5 + 0.5 * 0.5**0.5))),  # a quarter: cos 45 degrees
        (60, 2.0 * (0.1 + 0.9 * 0.5)),  # half way
        (110, 0.2),  # the last step is at the floor
    ],
)
def test_cosine_at_points_worked_out_by_hand(step, lr):
    assert cosine(step) == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize(
    ("step", "lr"),
    [
        (1, 0.2),
        (10, 2.0),
        (11, 2.0),
        (80, 2.0),  # the last before the decay
        (81, 2.0 * (0.1 + 0.9 * 19 / 20)),
        (90, 2.0 * (0.1 + 0.9 * 0.5)),
        (100, 0.2),
    ],
)
def test_wsd_at_points_worked_out_by_hand(step, lr):
    assert wsd(step) == pytest.approx(lr, rel=1e-12)


def test_wsd_without_decay_stays_at_the_peak():
    assert {wsd(step, decay_fraction=0.0) for step in range(10, 101)} == {2.0}


def test_wsd_that_decays_from_the_start():
    assert wsd(1, warmup_steps=0, decay_fraction=1.0) == pytest.approx(2 * (0.1 + 0.9 * 0.99))


@pytest.mark.parametrize("schedule", [cosine, wsd])
def test_without_warmup_the_first_step_is_not_zero(schedule):
    assert schedule(1, warmup_steps=0) > 1.99


@given(
    st.sampled_from(["cosine", "wsd"]),
    st.integers(1, 300),
    st.integers(0, 300),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_rate_is_positive_where_the_floor_is_and_falls_after_the_warmup(
    schedule, steps, warmup_steps, min_ratio, decay_fraction
):
    rates = [
        lr_at(
            step,
            steps=steps,
            peak=1.0,
            min_ratio=min_ratio,
            warmup_steps=warmup_steps,
            schedule=schedule,
            decay_fraction=decay_fraction,
        )
        for step in range(1, steps + 1)
    ]
    warm, rest = rates[:warmup_steps], rates[warmup_steps:]
    assert warm == sorted(warm)
    assert rest == sorted(rest, reverse=True)
    assert all(min_ratio - 1e-12 <= rate <= 1 + 1e-12 for rate in rest)
    assert all(0 < rate <= 1 for rate in warm)


# ---------------------------------------------------------------- AdamW

OPTIONS = {"betas": (0.8, 0.9), "eps": 1e-6}


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (4,), (2, 3, 4), (5,)]
    return [nn.Parameter(torch.randn(shape, generator=generator).double()) for shape in shapes]


def take_steps(optimizer: torch.optim.Optimizer, members: list[nn.Parameter], count: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for step in range(count):
        for parameter in members:
            parameter.grad = torch.randn(parameter.shape, generator=generator).double()
        for group in optimizer.param_groups:
            group["lr"] = 0.1 / (step + 1)
        optimizer.step()


def test_matrices_decay_and_vectors_do_not():
    matrix, vector, packed, norm = members = parameters()
    groups = adamw(members, weight_decay=0.3, **OPTIONS).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay == {id(matrix): 0.3, id(packed): 0.3, id(vector): 0.0, id(norm): 0.0}


def test_five_steps_are_those_of_adamw_written_out():
    members, literal = parameters(), [p.detach().clone() for p in parameters()]
    take_steps(adamw(members, weight_decay=0.3, **OPTIONS), members, 5)
    generator = torch.Generator().manual_seed(1)
    means = [torch.zeros_like(p) for p in literal]
    squares = [torch.zeros_like(p) for p in literal]
    for step in range(1, 6):
        for p, mean, square in zip(literal, means, squares, strict=True):
            grad = torch.randn(p.shape, generator=generator).double()
            p *= 1 - 0.1 / step * (0.3 if p.ndim > 1 else 0)
            mean += 0.2 * (grad - mean)
            square += 0.1 * (grad**2 - square)
            debiased = mean / (1 - 0.8**step), square / (1 - 0.9**step)
            p -= 0.1 / step * debiased[0] / (debiased[1].sqrt() + 1e-6)
    for ours, theirs in zip(members, literal, strict=True):
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


def test_moments_are_there_before_the_first_step_and_change_nothing():
    members, others = parameters(), parameters()
    optimizer = adamw(members, weight_decay=0.0, **OPTIONS)
    for parameter in members:
        state = optimizer.state[parameter]
        assert state["step"] == 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].shape == parameter.shape
            assert state[name].eq(0).all()
    take_steps(optimizer, members, 3)
    plain = torch.optim.AdamW(others, lr=0.0, weight_decay=0.0, fused=True, **OPTIONS)  # type: ignore[arg-type]
    take_steps(plain, others, 3)
    for ours, theirs in zip(members, others, strict=True):
        assert torch.equal(ours, theirs)
        assert optimizer.state[ours].keys() == plain.state[theirs].keys()


# ---------------------------------------------------------------- the norm


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator).double() for shape in ((8, 6), (4, 4, 4))]


def sharded_norm(dp_replicate: int, dp_shard: int) -> float:
    """The norm of two parameters, of which one is sharded unevenly."""
    mesh = init_device_mesh("cpu", (dp_replicate, dp_shard), mesh_dim_names=("replicate", "shard"))
    members = []
    for grad in gradients():
        placements = [Replicate(), Shard(grad.ndim - 2)]
        parameter = nn.Parameter(distribute_tensor(grad, mesh, placements))
        parameter.grad = distribute_tensor(grad, mesh, placements)  # type: ignore[assignment]
        members.append(parameter)
    share = torch.tensor(1.5 * (dist.get_rank() + 1), dtype=torch.float64)
    norm, loss = global_grad_norm(members, dp_replicate, share)
    assert loss == 1.5 * sum(range(1, dist.get_world_size() + 1))
    scale_grads(members, 0.5)
    for parameter, grad in zip(members, gradients(), strict=True):
        assert isinstance(parameter.grad, DTensor)
        assert torch.equal(parameter.grad.full_tensor(), grad / 2)
    return norm


@pytest.mark.parametrize(("dp_replicate", "dp_shard"), [(1, 1), (1, 3), (3, 1), (2, 2), (1, 8)])
def test_every_layout_has_the_norm_of_the_whole_gradient(dp_replicate, dp_shard):
    expected = torch.cat([grad.flatten() for grad in gradients()]).norm().item()
    norms = simulate_ranks(dp_replicate * dp_shard, sharded_norm, dp_replicate, dp_shard)
    assert norms == pytest.approx([expected] * len(norms), rel=1e-12)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_on_one_rank_is_seen_by_all(where, bad):
    def norm() -> float:
        parameter, loss = nn.Parameter(torch.ones(3)), torch.zeros((), dtype=torch.float64)
        parameter.grad = torch.ones(3)
        if dist.get_rank() == 1:
            (loss if where == "loss" else parameter.grad[2]).fill_(bad)
        return global_grad_norm([parameter], 1, loss)[0]

    norms = simulate_ranks(3, norm)
    assert not any(math.isfinite(norm) for norm in norms)


def test_parameters_without_gradient_count_nothing():
    with_grad, without = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))
    with_grad.grad = torch.full((4,), 2.0)
    loss = torch.tensor(5.0, dtype=torch.float64)
    (totals,) = simulate_ranks(1, lambda: global_grad_norm([with_grad, without], 1, loss))
    assert totals == (4.0, 5.0)
    scale_grads([with_grad, without], 0.25)
    assert with_grad.grad.eq(0.5).all()
    assert without.grad is None
