"""The conformance suite: moetrain holds every invariant, and the suite notices what breaks one."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import runpy
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moetrain.moe import AllToAll, Draws, MoE, balance, capacity, dispatch, routing
from moetrain.moe import layer as moe_layer
from moetrain.moe import router as moe_router
from moetrain.testing import RankPool, simulate_ranks
from moetrain.testing.conformance import (
    ALONE,
    INVARIANTS,
    Lab,
    Layout,
    Order,
    Pass,
    Verdict,
    check,
    check_all,
)

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # where the systems under test are adapted

from adapters import own, plain  # noqa: E402
from adapters.own import GATES, Own, case  # noqa: E402
from adapters.peer import Peer  # noqa: E402
from adapters.peer import case as peer_case  # noqa: E402

TWO = Layout(ranks=2, ep=2)
CANNOT_COLLAPSE = ("expert_choice", "hash", "random", "balanced", "dense", "hierarchical")
CHEAP = ("I1", "I2", "I8", "I12")
"""What one run of a layout tells."""


def require_all(verdicts: Mapping[str, Verdict], but: Mapping[str, str] | None = None) -> None:
    """Every invariant holds, except those that are expected to be something else."""
    found = {invariant: verdict.status for invariant, verdict in verdicts.items()}
    assert found == dict.fromkeys(verdicts, "holds") | dict(but or {}), verdicts


# ---- moetrain ------------------------------------------------------------------------------------


def test_every_invariant_of_the_contract_is_there() -> None:
    assert list(INVARIANTS) == [f"I{number}" for number in range(1, 17)]
    for invariant, judge in INVARIANTS.items():
        assert (judge.__doc__ or "").startswith(f"{invariant}: ")


@pytest.mark.parametrize("gate", GATES)
def test_every_gate_holds_every_invariant(gate: str) -> None:
    but = {"I11": "not exposed"}  # the engine's, below
    if gate in CANNOT_COLLAPSE:
        but["I16"] = "not supported"
    require_all(check_all(Lab(Own()), case(gate), TWO), but)


@pytest.mark.parametrize(
    ("layout", "gates"),
    [
        (Layout(2, 1), tuple(GATES)),
        (Layout(4, 4, calls=2), tuple(GATES)),
        (Layout(8, 8), tuple(GATES)),
        (Layout(16, 16), tuple(GATES)),
        (Layout(64, 64), ("gshard", "sigmoid", "hierarchical")),  # the others: docs/support.md
    ],
    ids=lambda value: str(value) if isinstance(value, Layout) else "",
)
def test_sizes_of_expert_parallelism(layout: Layout, gates: tuple[str, ...]) -> None:
    size = max(8, layout.ranks)
    lab, cases = Lab(Own()), [case(gate, experts=size, sequences=size) for gate in gates]
    for where in (layout, ALONE):
        lab.prepare(where, [Order(each) for each in cases])
    for each in cases:
        require_all(check_all(lab, each, layout, CHEAP))


@pytest.mark.parametrize("policy", ["probability", "random", "spill"])
def test_drop_policies(policy: str) -> None:
    lab = Lab(Own())
    for gate, layout in itertools.product(("gshard", "topk"), (TWO, Layout(4, 2))):
        tight = case(gate, drop_policy=policy, capacity_factor=1.0)
        require_all(check_all(lab, tight, layout, (*CHEAP, "I4")))


@pytest.mark.parametrize("gate", ["topk", "noisy_topk", "sigmoid", "hierarchical", "hash"])
def test_the_engine_holds_what_concerns_it(gate: str) -> None:
    invariants = ("I1", "I2", "I11", "I13")
    require_all(check_all(Lab(Own("engine")), case(gate), Layout(4, 2), invariants))


def test_gloo_processes_agree(ranks2: RankPool, ranks4: RankPool) -> None:
    pools = {2: ranks2, 4: ranks4}

    def launch(num_ranks: int, fn: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        if num_ranks in pools:
            return pools[num_ranks].run(fn, *args, timeout=timeout)
        return simulate_ranks(num_ranks, fn, *args, timeout=timeout)

    lab, cases = Lab(Own(), launch), [case(gate) for gate in GATES]
    for layout in (TWO, Layout(4, 4)):
        lab.prepare(layout, [Order(each) for each in cases])
        for each in cases:
            require_all(check_all(lab, each, layout, CHEAP))


def test_what_is_refused_has_its_reason() -> None:
    refused = check("I1", Lab(Own()), case("hash", drop_policy="probability"), TWO)
    assert refused.status == "not supported"
    assert "all gates of moe.router hash with moe.top_k (2) are equal" in refused.detail


# ---- the suite can fail --------------------------------------------------------------------------


class Tampered(Own):
    """moetrain, with a change to what a run returns or does."""

    def __init__(self, change: Callable[[Any, Pass], Pass]):
        super().__init__()
        self.change = change

    def build(self, *args: Any) -> Any:
        """A layer whose passes are changed."""
        layer = super().build(*args)
        honest = layer.run
        layer.run = lambda *asked: self.change(layer, honest(*asked))  # type: ignore[method-assign]
        return layer


def expert_gradients_times_ep(layer: Any, seen: Pass) -> Pass:
    factor = {name: layer.mesh.ep if ".experts." in name else 1 for name in seen.grads}
    return seen._replace(grads={name: factor[name] * g for name, g in seen.grads.items()})


def norm_of_its_own_experts(layer: Any, seen: Pass) -> Pass:
    return seen._replace(grad_norm=(seen.grad_norm or 0) / (1 + dist.get_rank()))


def no_gradient_for_idle_experts(layer: Any, seen: Pass) -> Pass:
    idle = {n for n, g in seen.grads.items() if not g.flatten(1).any(1).all()}
    return seen._replace(grads={n: g for n, g in seen.grads.items() if n not in idle})


def lost_assignments(layer: Any, seen: Pass) -> Pass:
    return seen._replace(outcomes={**(seen.outcomes or {}), "dropped": 0})


def counts_after_drops(layer: Any, seen: Pass) -> Pass:
    placed = [None] * dist.get_world_size()
    assert seen.routes is not None
    dist.all_gather_object(placed, seen.routes.placed_TK)
    placed_TK = torch.cat(placed)  # type: ignore[arg-type]
    return seen._replace(load_E=placed_TK[placed_TK >= 0].bincount(minlength=8))


def int32_counts(layer: Any, seen: Pass) -> Pass:
    assert seen.load_E is not None
    return seen._replace(load_E=seen.load_E.int())


@pytest.mark.parametrize(
    ("invariant", "change", "seen"),
    [
        ("I1", expert_gradients_times_ep, r"experts.* is 2 × the reference$"),
        ("I2", norm_of_its_own_experts, r"norms 0\.\d+, 0\.\d+; the whole gradient's is 0"),
        ("I4", lost_assignments, r"128 assigned, but outcomes add up to \d+"),
        ("I4", counts_after_drops, r"load \[.*\], but the choices were"),
        ("I9", no_gradient_for_idle_experts, "without tokens has no gradient"),
        ("I14", int32_counts, r"counts are torch\.int32"),
    ],
)
def test_wrong_numbers_are_noticed(invariant: str, change: Any, seen: str) -> None:
    verdict = check(invariant, Lab(Tampered(change)), case("topk"), TWO)
    assert verdict.status == "fails"
    assert re.search(seen, verdict.detail), verdict


Patch = pytest.MonkeyPatch


def statistics_after_drops(patch: Patch) -> None:
    honest = MoE.stats

    def stats(self, routed):
        record, plan = routed.record, routed.plan
        lost_TK = plan.row_TK >= plan.source_R.numel()
        kept = record._replace(expert_TK=record.expert_TK.masked_fill(lost_TK, record.num_experts))
        loss = honest(self, routed._replace(record=kept, settled=kept)).balance_sum
        return honest(self, routed)._replace(balance_sum=loss)

    patch.setattr(MoE, "stats", stats)


def renormalised_after_drops(patch: Patch) -> None:
    honest = MoE.route

    def route(self, *args):
        routed = honest(self, *args)
        plan, settled = routed.plan, routed.settled
        kept_TK = settled.gate_TK.where(plan.row_TK < plan.source_R.numel(), 0)
        gate_TK = kept_TK / kept_TK.sum(1, keepdim=True).clamp(min=1e-9)
        return routed._replace(settled=settled._replace(gate_TK=gate_TK))

    patch.setattr(MoE, "route", route)


def capacity_per_choice(patch: Patch) -> None:
    def per_choice(group_size, experts, k, factor, least):
        return min(group_size, k * capacity(group_size, experts, k, factor, least))

    patch.setattr(moe_layer, "capacity", per_choice)


def capacity_that_raises(patch: Patch) -> None:
    def limited(group_size, experts, k, factor, least):
        if factor * k > experts:
            raise ValueError("more slots than tokens")
        return capacity(group_size, experts, k, factor, least)

    patch.setattr(moe_layer, "capacity", limited)


def copies_of_one_expert(patch: Patch) -> None:
    honest = plain.initial_value

    def initial_value(module, name, shape, seed, layers, experts):
        value = honest(module, name, shape, seed, layers, range(1) if experts else experts)
        return value.expand(len(experts), *value.shape[1:]).clone() if experts else value

    patch.setattr(plain, "initial_value", initial_value)


def experts_drawn_by_rank(patch: Patch) -> None:
    honest = plain.initial_value

    def initial_value(module, name, shape, seed, layers, experts):
        return honest(module, name, shape, seed + dist.get_rank(), layers, experts)

    patch.setattr(plain, "initial_value", initial_value)


def noise_from_the_generator(patch: Patch) -> None:
    honest = moe_router._logits
    patch.setattr(
        moe_router,
        "_logits",
        lambda w, x: (y := honest(w, x)) + torch.randn(y.shape, dtype=y.dtype),
    )


def noise_by_the_clock(patch: Patch) -> None:
    honest, calls = moe_router._logits, itertools.count()

    def logits(weight_ED, x_TD):
        logits_TE = honest(weight_ED, x_TD)
        generator = torch.Generator().manual_seed(next(calls))
        return logits_TE + torch.randn(logits_TE.shape, generator=generator)

    patch.setattr(moe_router, "_logits", logits)


def router_in_bf16(patch: Patch) -> None:
    def logits(weight_ED, x_TD):
        return (x_TD.bfloat16() @ weight_ED.bfloat16().T).float()

    patch.setattr(moe_router, "_logits", logits)


def ties_to_the_last(patch: Patch) -> None:
    honest = routing.choose
    patch.setattr(routing, "choose", lambda score_TE, k: 7 - honest(score_TE.flip(1), k))


def draws_by_place(patch: Patch) -> None:
    honest = moe_router.keyed.uniform

    def uniform(draws: Draws, *args: Any) -> torch.Tensor:
        here_T = torch.arange(len(draws.token_id_T))
        return honest(draws._replace(token_id_T=here_T), *args)

    patch.setattr(moe_router.keyed, "uniform", uniform)


def padding_in_the_balance(patch: Patch) -> None:
    forward = MoE.forward

    def see_everything(self, x_BLD, valid_BL, *others):
        return forward(self, x_BLD, torch.ones_like(valid_BL), *others)

    patch.setattr(MoE, "forward", see_everything)


def results_of_the_next_row(patch: Patch) -> None:
    honest = dispatch.head_back
    patch.setattr(dispatch, "head_back", lambda rows, route: honest(rows.roll(1, dims=0), route))


def local_means(patch: Patch) -> None:
    patch.setattr(
        own, "count_all", lambda parts, mesh: own.Counts(*map(sum, zip(*parts, strict=True)))
    )


def layers_concatenated(patch: Patch) -> None:
    honest = own.reduce

    def reduce(parts, counts, mesh, *rest):
        means = honest(parts, counts, mesh, *rest)
        both = [sum(entries) for entries in zip(*parts[0].demands, strict=True)]
        gate = own.build_gate(own.Config().moe)
        loss = balance.balance(gate, balance.Demand(*both)).item()  # type: ignore[arg-type]
        return means._replace(balance_loss=loss)

    patch.setattr(own, "reduce", reduce)


def ranks_without_tokens_stay_away(patch: Patch) -> None:
    honest = AllToAll.dispatch

    def dispatch(self, x_TD, plan):
        while not plan.count_E.any():
            time.sleep(0.05)
        return honest(self, x_TD, plan)

    patch.setattr(AllToAll, "dispatch", dispatch)


def experts_by_place_on_the_rank(patch: Patch) -> None:
    honest = own.OwnLayer.restore

    def restore(self, folder):
        honest(self, folder)
        state = self.state()
        self.load({n: v.roll(1, dims=0) if ".experts." in n else v for n, v in state.items()})

    patch.setattr(own.OwnLayer, "restore", restore)


@pytest.mark.parametrize(
    ("invariant", "gate", "inject", "seen"),
    [
        ("I3", "topk", local_means, r"loss -?0\.\d+, not -?0"),
        ("I4", "topk", statistics_after_drops, r"balance loss [\d.]+ with drops, [\d.]+ without"),
        ("I4", "gshard", renormalised_after_drops, r"change the weight of \d+ of \d+ .*-fold"),
        ("I5", "topk", padding_in_the_balance, "padding of other content changes .*auxiliary"),
        ("I6", "topk", noise_from_the_generator, "changed with the seed"),
        ("I7", "topk", noise_by_the_clock, "recomputed on rank 0|Recomputed .* different metadata"),
        ("I7", "topk", ties_to_the_last, r"64 of 64 tied tokens: \[\(7, 6\)\]"),
        ("I8", "random", draws_by_place, "go to other experts than in one process"),
        ("I9", "topk", ranks_without_tokens_stay_away, "some ranks without tokens.*TimeoutError"),
        ("I10", "topk", results_of_the_next_row, "outputs"),
        ("I12", "topk", capacity_per_choice, r"took [45] of a group; its capacity is 3"),
        ("I13", "topk", copies_of_one_expert, r"experts \[1, 2, 3, 4, 5, 6, 7\] equal"),
        ("I13", "topk", experts_drawn_by_rank, "starts from other .*experts"),
        ("I14", "topk", router_in_bf16, r"\d+ of 1024 tokens chose otherwise"),
        ("I15", "topk", capacity_that_raises, "raises ValueError: more slots"),
        ("I16", "topk", layers_concatenated, "onto one expert lose .*onto different ones"),
    ],
)
def test_broken_layers_are_caught(
    invariant: str, gate: str, inject: Callable[[Patch], None], seen: str, monkeypatch: Patch
) -> None:
    inject(monkeypatch)
    verdict = check(invariant, Lab(Own(), timeout=1.5), case(gate), TWO)
    assert verdict.status == "fails"
    assert re.search(seen, verdict.detail), verdict


def test_a_checkpoint_by_local_expert_is_caught(monkeypatch: Patch) -> None:
    experts_by_place_on_the_rank(monkeypatch)
    verdict = check("I11", Lab(Own("engine")), case("topk"), TWO)
    assert verdict.status == "fails"
    assert re.search(r"experts\.w_gate_up differs in rows \[0, 1, 2", verdict.detail), verdict


def test_what_is_not_shown_never_holds() -> None:
    shown = ("auxiliary", "grad_norm", "routes", "load_E", "outcomes", "effective_factor", "bias_E")
    adapter = Tampered(lambda layer, seen: seen._replace(**dict.fromkeys(shown)))
    adapter.hidden = {"grad_norm": "kept to itself"}
    lab = Lab(adapter)
    verdicts = check_all(lab, case("topk"), TWO, ("I2", "I4", "I7", "I8", "I12", "I14", "I16"))
    assert {verdict.status for verdict in verdicts.values()} == {"not exposed"}, verdicts
    assert verdicts["I2"].detail == "kept to itself"


# ---- DeepSpeed -----------------------------------------------------------------------------------


def test_deepspeed_runs_under_the_suite(ranks2: RankPool) -> None:
    """Its expert gradients are right, and it does not count drops: one of each kind of verdict."""

    def launch(num_ranks: int, fn: Callable[..., Any], *args: Any, timeout: float) -> list[Any]:
        return ranks2.run(fn, *args, timeout=timeout)

    lab, tight = Lab(Peer(), launch), peer_case("top2", capacity_factor=1.0)
    ranks = lab.run(TWO, dataclasses.replace(tight, sequences=2))
    assert len(ranks) == 2
    for rank in ranks:
        assert set(rank.grads) == {
            "0.gate.wg.weight",
            "0.experts.up.weight",
            "0.experts.down.weight",
        }
        assert all(grad.any() and grad.isfinite().all() for grad in rank.grads.values())
    assert check("I12", lab, dataclasses.replace(tight, sequences=2), TWO).status == "not exposed"


# ---- what the documentation says of it -----------------------------------------------------------


def test_the_pages_are_in_step_with_what_ran() -> None:
    results = json.loads((ROOT / "benchmarks/results/conformance.json").read_text())
    benchmark = runpy.run_path(str(ROOT / "benchmarks/conformance.py"))
    readme = (ROOT / "README.md").read_text()
    assert (ROOT / "docs/support.md").read_text() == benchmark["support_page"](results)
    assert readme == benchmark["with_table"](readme, results), "python benchmarks/conformance.py"


def test_every_gate_ran_at_every_size() -> None:
    results = json.loads((ROOT / "benchmarks/results/conformance.json").read_text())
    accepted = [entry for entry in results["support"] if entry["refused"] is None]
    assert {entry["gate"] for entry in accepted} == set(GATES)
    assert all(entry["ep"] == [1, 2, 4, 8, 16, 64] for entry in accepted)
    verdicts = results["systems"]["moetrain"]
    assert {gate for gate, *_ in verdicts} == set(GATES)
    assert {status for _, _, _, status, _ in verdicts} == {"holds", "not supported"}
