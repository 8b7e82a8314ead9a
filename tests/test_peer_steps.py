"""A whole Hugging Face Mixtral beside moetrain's model: parameters, losses, every gradient."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, initialised, small_config
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))

import step
from stepping import mixtral, own
from stepping.shapes import MIXTRAL, SHAPES, Cell, config_of, tokens_per_step

from moetrain.config import Config
from moetrain.data import Batch
from moetrain.evaluate import forward
from moetrain.model import Transformer
from moetrain.objective import count, objective, sums
from moetrain.sizes import sizes
from moetrain.testing import simulate_ranks

CPU = torch.device("cpu")
aten = torch.ops.aten


def config(layers: int, tie: bool) -> Config:
    """A small dropless Mixtral, balanced over the whole batch, as Hugging Face balances."""
    return small_config(
        model={"layers": layers, "kv_heads": 2, "tie_embeddings": tie},
        moe={**MIXTRAL, "capacity_factor": None, "eval_capacity_factor": None}
        | {"group": "microbatch", "balance_coef": 0.5},
    )


def batch() -> Batch:
    """Two sequences of eight tokens."""
    tokens_B9 = torch.randint(VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    ids_BL = torch.arange(16).view(2, 8)
    valid_BL = torch.ones(2, 8, dtype=torch.bool)
    return Batch(tokens_B9[:, :-1], tokens_B9[:, 1:].contiguous(), valid_BL, ids_BL, None)


def pair(layers: int, tie: bool, kind: mixtral.Kind = "eager") -> tuple[Transformer, Any]:
    """Our model, and theirs with its weights."""
    ours = initialised(config(layers, tie), torch.float32)
    theirs = mixtral.mixtral(config(layers, tie), VOCAB, kind, CPU)
    theirs.load_state_dict(mixtral.renamed(dict(ours.named_parameters())))
    return ours, theirs


@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
@pytest.mark.parametrize("tie", [True, False])
def test_a_mixtral_has_as_many_parameters_and_the_same_loss(tie: bool, kind: mixtral.Kind) -> None:
    ours, theirs = pair(2, tie, kind)
    assert own.count(theirs) == sizes(ours).total
    loss_sum = forward(ours, batch(), "train").loss_sum
    assert loss_sum is not None
    found = mixtral.outputs(theirs, batch())
    balance = theirs.config.router_aux_loss_coef * found.aux_loss
    torch.testing.assert_close(found.loss - balance, loss_sum / 16, rtol=1e-5, atol=1e-5)


def test_the_objective_of_a_layer_and_all_its_gradients_are_a_mixtrals() -> None:
    """Balance and all. Of one layer, since Hugging Face takes the experts of all layers as one."""
    ours, theirs = pair(1, tie=False)
    of_ours = sums(forward(ours, batch(), "train"))
    value = objective(of_ours, count(batch(), None), balance_coef=0.5, z_coef=0.0)
    of_theirs = mixtral.outputs(theirs, batch())
    assert of_theirs.aux_loss.item() > 1.9  # it is in the objective: 2 at perfect balance
    torch.testing.assert_close(of_theirs.loss, value, rtol=1e-5, atol=1e-5)
    value.backward()
    of_theirs.loss.backward()
    gradients = {name: weight.grad for name, weight in ours.named_parameters()}
    expected = mixtral.renamed(gradients)  # type: ignore[arg-type]
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(weight.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


class ProductDtypes(TorchDispatchMode):
    """Notes what matrix products are made of, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (aten.mm.default, aten.bmm.default, aten._grouped_mm.default):
            self.found += [args[0].dtype, args[1].dtype]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
def test_a_mixtral_in_bf16_has_no_other_products(kind: mixtral.Kind) -> None:
    wide = {"model": {"dim": 16}, "moe": {"expert_ffn_dim": 16}}  # grouped products take no less
    theirs = mixtral.mixtral(small_config(**wide), VOCAB, kind, CPU)
    number = own.count(theirs)
    if kind == "grouped_mm":
        mixtral.cast_experts(theirs)
    assert own.count(theirs) == number
    with torch.autocast("cpu", torch.bfloat16), ProductDtypes() as products:
        mixtral.outputs(theirs, batch()).loss.backward()
    assert set(products.found) == {torch.bfloat16}
    assert {weight.grad.dtype for weight in theirs.parameters()} == {torch.float32}


def test_a_mixtral_starts_from_the_weights_of_a_run() -> None:
    of_run = initialised(config(2, tie=True), torch.float32).state_dict()
    (first,) = simulate_ranks(1, lambda: mixtral.first_weights(config(2, tie=True), VOCAB, CPU))
    assert first.keys() == of_run.keys()
    assert all(torch.equal(first[name], of_run[name]) for name in first)


def test_the_optimizer_is_that_of_a_run() -> None:
    _, theirs = pair(1, tie=True)
    decayed, others = mixtral.adamw(theirs, config(1, tie=True)).param_groups
    assert decayed["weight_decay"] == 0.1
    assert others["weight_decay"] == 0
    assert {weight.ndim for weight in others["params"]} == {1}
    assert sum(len(group["params"]) for group in (decayed, others)) == len(
        list(theirs.parameters())
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_run_of_steady_steps(shape: str) -> None:
    given = config_of(Cell(shape, "bf16"), 1.25)
    assert given.moe.capacity_factor == 1.25
    assert given.accumulation(1) * given.train.micro_batch == given.train.global_batch
    spread = config_of(Cell(shape, "bf16", ranks=2), 1.25)
    assert (spread.parallel.ep, spread.accumulation(2)) == (2, given.accumulation(1))
    assert tokens_per_step(given) == given.train.global_batch * given.data.seq_len
    counted, flops = step.model_sizes(Cell(shape, "bf16"))
    assert counted.active < counted.total
    assert flops > 6 * (counted.active - 2 * counted.embedding)


def test_contenders_that_differ_are_not_timed() -> None:
    same = {"parameters": 10, "loss": 5.0}
    step.check_alike({"a": same, "b": {**same, "loss": 5.00005}}, parameters=10)
    with pytest.raises(RuntimeError, match="the losses of the same weights differ"):
        step.check_alike({"a": same, "b": {**same, "loss": 5.001}}, parameters=10)
    with pytest.raises(RuntimeError, match="not all have 11 parameters"):
        step.check_alike({"a": same}, parameters=11)


def test_utilization_is_of_the_peak() -> None:
    """A step of 6e12 FLOPs in 2 and 3 seconds, on a device of 1e13 a second."""
    assert step.mfu([2.0, 3.0, 2.0], 6e12, 1e13) == pytest.approx((0.3, 0.2, 0.3))
