"""torch.compile: the capacity path is one graph, which computes what the plain code computes.

Most tests stop before machine code is generated (`aot_eager`), which takes longest and is torch's
own; one goes all the way.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import parity
import pytest
import torch
from deepspeed_layouts import ROUNDING
from layers import ROUTERS, build
from layouts import Layout, pick, spread
from test_recompute import gradients, inputs
from torch.torch_version import TorchVersion

from moetrain import engines, parallel
from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.moe import MoE
from moetrain.testing import RankPool

WAYS = [
    ("switch", "spill"),
    ("gshard", "probability"),
    ("topk", "random"),
    ("noisy_topk", "position"),
    ("sigmoid", "spill"),
    ("hierarchical", "probability"),
    ("expert_choice", "position"),
    ("hash", "spill"),
    ("random", "random"),
    ("balanced", "position"),
    ("dense", "probability"),
]
"""Every gate, every drop policy."""


def to_graphs(
    patch: pytest.MonkeyPatch | None = None, backend: str = "aot_eager"
) -> Callable[..., Any]:
    """Compile to graphs alone, whole or not at all; `eager` leaves out those of backward passes."""
    one_graph = functools.partial(torch.compile, backend=backend, fullgraph=True, dynamic=False)
    if patch is not None:
        patch.setattr(parallel, "_one_graph", one_graph)
    return one_graph


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def close(one: Any, other: Any) -> None:
    """Equal up to the rounding of fp64; integers exactly."""
    if isinstance(one, tuple | list):
        for mine, theirs in zip(one, other, strict=True):
            close(mine, theirs)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    else:
        assert one == other


@pytest.mark.parametrize(("kind", "policy"), WAYS)
def test_a_layer_with_a_capacity_is_one_graph(kind: str, policy: str) -> None:
    jitter = {"jitter": 0.1} if kind == "switch" else {}
    moe = build(ROUTERS[kind], 4, capacity_factor=0.75, drop_policy=policy, **jitter)
    arguments = inputs(moe, "train")
    plain, compiled = moe(*arguments), to_graphs()(moe.forward)(*arguments)
    close(tuple(compiled), tuple(plain))
    close(gradients(moe, compiled), gradients(moe, plain))


def test_a_plan_of_another_size_is_another_graph() -> None:
    moe = build(ROUTERS["topk"], 4, capacity_factor=0.75)
    x_BLD, valid_BL, *others, _ = inputs(moe, "eval")
    run = to_graphs(backend="eager")(moe.forward)
    for length in (12, 6, 12):
        arguments = x_BLD[:, :length], valid_BL[:, :length], *others
        close(tuple(run(*arguments)), tuple(moe(*arguments)))


@torch._dynamo.config.patch(recompile_limit=2)
def test_another_capacity_factor_is_another_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the autopilot changes it between steps, and back. More shapes than the limit set here."""
    to_graphs(monkeypatch, "eager")
    moe = build(ROUTERS["gshard"], 4, capacity_factor=0.75, watched_factors=(0.5, 0.75, 1.0))
    parallel.allow_graphs(1, num_shapes=3)
    run, arguments = parallel._where_static(moe, decides_first=False), inputs(moe, "train")
    slots = []
    for factor in (0.75, 1.0, 0.5, 0.75):
        moe.factors["train"] = factor
        output = run(*arguments)
        close(tuple(output), tuple(moe(*arguments)))
        slots.append(int(output.stats.ledger.slots))
    assert slots[2] < slots[0] == slots[3] < slots[1]


@pytest.mark.parametrize(("version", "refused"), [("2.12.1+cu130", True), ("2.13.0+cpu", False)])
def test_fp64_is_refused_where_its_code_does_not_run(
    version: str, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "torch_version", TorchVersion(version))
    in_fp64 = Config.model_validate({"engine": {"compile": True, "precision": "fp64"}})
    message = r"engine.compile \(true\) with engine.precision \(fp64\) needs torch 2.13"
    with pytest.raises(UserError, match=message) if refused else nullcontext():
        engines.check(in_fp64, 1)


@pytest.mark.parametrize("factor", [0.75, None])
def test_only_passes_with_a_capacity_are_compiled(
    factor: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: calls.append(1) or function(*arguments, **named)

    monkeypatch.setattr(parallel, "_one_graph", noted)
    moe = build(ROUTERS["topk"], 4, capacity_factor=factor)
    run = parallel._where_static(moe, decides_first=False)
    arguments = inputs(moe, "eval")
    close(tuple(run(*arguments)), tuple(moe(*arguments)))
    assert len(calls) == (factor is not None)
    run(arguments[0], arguments[1], "generate")
    assert len(calls) == (factor is not None)


# ---- a whole run ---------------------------------------------------------------------------------


def on_rank(*arguments: Any) -> parity.Outcome:
    """See `parity.on_rank`."""
    with pytest.MonkeyPatch.context() as patch:
        to_graphs(patch)
        return parity.on_rank(*arguments)


def test_compiled_ranks_equal_one_process(ranks2: RankPool) -> None:
    """Gradients, norm and weights after a step, with experts on two ranks, computed in parts and
    computed again."""
    case = pick("topk", dropless=False)
    sections = spread(case.config, Layout(2, ep=2, dp_replicate=1, micro=8)).model_dump()
    sections["engine"] |= {"compile": True, "activation_checkpointing": "full"}
    sections["parallel"]["overlap_chunks"] = 2
    config = Config.model_validate(sections)
    ranks = ranks2.run(on_rank, config, case.text, None, 1, timeout=240)
    parity.agree(ranks, parity.alone(case.config, case.text, steps=1))


@pytest.mark.skipif(shutil.which("g++") is None, reason="machine code needs a C++ compiler")
def test_machine_code_computes_the_same() -> None:
    """Down to the last step of compilation; in fp32, since it may reorder sums."""
    moe = build(ROUTERS["topk"], 4, capacity_factor=0.75).float()
    x_BLD, *others = inputs(moe, "train")
    arguments = x_BLD.float(), *others
    plain = moe(*arguments)
    output = torch.compile(moe.forward, fullgraph=True, dynamic=False)(*arguments)
    assert torch.equal(output.decisions.plan.row_TK, plain.decisions.plan.row_TK)
    torch.testing.assert_close(output.y_BLD, plain.y_BLD, rtol=ROUNDING, atol=ROUNDING)
    for mine, theirs in zip(gradients(moe, output), gradients(moe, plain), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@torch._dynamo.config.patch(recompile_limit=2)
def test_every_layer_may_have_a_graph_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws are keyed by the layer's number: three are more than the limit set here."""
    to_graphs(monkeypatch, "eager")
    layers: list[MoE] = []
    for number in range(3):
        moe = build(ROUTERS["gshard"], 4, capacity_factor=0.75, min_capacity=2)
        moe.layer = moe.router.layer = number
        layers.append(moe)
    parallel.allow_graphs(len(layers))
    for moe in layers:
        run = parallel._where_static(moe, decides_first=False)
        arguments = inputs(moe, "train")
        close(tuple(run(*arguments)), tuple(moe(*arguments)))
