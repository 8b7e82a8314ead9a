"""Invariants about routing: drops, padding, ties, counts, losses (I4-I7, I12, I14-I16).

Shape suffixes: T tokens, K choices, E experts, G routing groups, S tokens of one.
"""

from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import torch
from torch import Tensor

from moetrain.testing.conformance.adapter import Case, Layout, Pass, Routes
from moetrain.testing.conformance.batches import (
    batch,
    collapsed,
    collapsed_apart,
    cut,
    given_state,
    padded,
    padded_otherwise,
    tied,
    unbiased,
)
from moetrain.testing.conformance.lab import Lab, initial_state
from moetrain.testing.conformance.verdict import (
    InvariantError,
    NotExposedError,
    NotSupportedError,
    is_close,
    ratio,
    require,
    shown,
)


def ledger(lab: Lab, case: Case, layout: Layout) -> str:
    """I4: every assignment has one outcome; counts, balance loss and gates are those before drops.

    What depends on nothing but the choices is compared with a run in which nothing is dropped.
    """
    ranks = lab.run(layout, case)
    seen, missing = [], []
    if case.capacity_factor is not None and case.chooses != "tokens":
        ample = lab.run(layout, lab.without_drops(case, layout))
        seen += _unchanged_by_drops(lab, case, ranks, ample)
    for judge in (_conserved, _counts_choices):
        try:
            seen.append(judge(lab, case, layout, ranks))
        except NotExposedError as reason:
            missing.append(str(reason))
    if missing:
        raise NotExposedError("; ".join(missing) + (f" ({', '.join(seen)})" if seen else ""))
    return ", ".join(seen)


def _unchanged_by_drops(lab: Lab, case: Case, ranks: list[Pass], ample: list[Pass]) -> list[str]:
    seen = []
    tight_loss, loss = ranks[0].auxiliary, ample[0].auxiliary
    if tight_loss is not None and loss is not None:
        same = is_close(tight_loss, loss, case.dtype)
        require(same, f"balance loss {tight_loss:.6g} with drops, {loss:.6g} without")
        seen.append("balance loss before drops")
    if ranks[0].bias_E is not None and ample[0].bias_E is not None:
        tight_E, free_E = ranks[0].bias_E.tolist(), ample[0].bias_E.tolist()
        require(tight_E == free_E, f"router bias {tight_E} with drops, {free_E} without")
        seen.append("router bias before drops")
    for tight, free in zip(ranks, ample, strict=True):
        if tight.routes is None or tight.routes.gate_TK is None or free.routes is None:
            return seen
        kept_TK = _kept_as_chosen(tight.routes)
        mine, theirs = tight.routes.gate_TK[kept_TK], free.routes.gate_TK[kept_TK]  # type: ignore[index]
        if not is_close(mine, theirs, case.dtype):
            factor = (mine / theirs).max()
            changed = int(((mine - theirs).abs() > 1e-4).sum())
            raise InvariantError(
                f"drops change the weight of {changed} of {len(mine)} assignments that were kept, "
                f"up to {factor:.3g}-fold"
            )
    return [*seen, "gates before drops"]


def _kept_as_chosen(routes: Routes) -> Tensor:
    return (routes.placed_TK >= 0) & (routes.placed_TK == routes.expert_TK)


def _conserved(lab: Lab, case: Case, layout: Layout, ranks: list[Pass]) -> str:
    outcomes = dict(shown(lab.adapter, "outcomes", ranks[0].outcomes))
    routes = [shown(lab.adapter, "routes", rank.routes) for rank in ranks]
    assigned = outcomes.pop("assigned")
    total = sum(outcomes.values())
    require(total == assigned, f"{assigned} assigned, but outcomes add up to {total}: {outcomes}")
    chosen = sum(int((r.expert_TK >= 0).sum()) for r in routes)
    require(assigned == chosen, f"{assigned} assigned, but {chosen} choices were made")
    arrived = outcomes["kept"] + outcomes.get("spilled", 0)
    placed = sum(int((r.placed_TK >= 0).sum()) for r in routes)
    require(arrived == placed, f"{arrived} said to be kept, but {placed} were computed")
    return f"{assigned} assigned = {outcomes}"


def _counts_choices(lab: Lab, case: Case, layout: Layout, ranks: list[Pass]) -> str:
    load_E = shown(lab.adapter, "load_E", ranks[0].load_E)
    expert_TK = torch.cat([shown(lab.adapter, "routes", rank.routes).expert_TK for rank in ranks])
    counted_E = expert_TK[expert_TK >= 0].bincount(minlength=case.experts)
    same = torch.equal(load_E.long(), counted_E)
    require(same, f"load {load_E.tolist()}, but the choices were {counted_E.tolist()}")
    return "load counts choices before drops"


def padding(lab: Lab, case: Case, layout: Layout) -> str:
    """I5: padding reaches no output, gradient, loss or count, and takes no slot."""
    if reason := lab.adapter.padding(case):
        raise NotSupportedError(reason)
    wrong = set()
    pairs = zip(lab.run(layout, case, padded), lab.run(layout, case, padded_otherwise), strict=True)
    for rank, (one, other) in enumerate(pairs):
        valid_BL = _valid(lab, case, layout, rank)
        if not is_close(one.output_BLD[valid_BL], other.output_BLD[valid_BL], case.dtype):
            wrong.add("outputs of real tokens")
        for name in ("loss", "auxiliary"):
            mine, theirs = getattr(one, name), getattr(other, name)
            if mine is not None and not is_close(theirs, mine, case.dtype):
                wrong.add(f"{name} {mine:.6g} and {theirs:.6g}")
        for name, grad in one.grads.items():
            if not is_close(other.grads[name], grad, case.dtype):
                wrong.add(f"gradient of {name}")
        wrong |= _other_load(one, other)
        if one.routes is not None and (one.routes.placed_TK[~valid_BL.flatten()] >= 0).any():
            wrong.add("slots, of which padding takes some")
        if one.load_E is not None and case.chooses != "tokens":
            wrong |= _load_of_padding(case, int(one.load_E.sum()), _num_valid(lab, case))
    require(not wrong, f"{layout}: padding of other content changes {', '.join(sorted(wrong))}")
    return "padding of other content changes nothing"


def _other_load(one: Pass, other: Pass) -> set[str]:
    if one.load_E is None or other.load_E is None or torch.equal(one.load_E, other.load_E):
        return set()
    return {f"load {one.load_E.tolist()} and {other.load_E.tolist()}"}


def _load_of_padding(case: Case, load: int, num_valid: int) -> set[str]:
    choices = case.top_k * num_valid
    return set() if load == choices else {f"load {load}, not the {choices} choices of real tokens"}


def _num_valid(lab: Lab, case: Case) -> int:
    return int(padded(lab.adapter, {}, batch(case))[1].valid_BL.sum())


def _valid(lab: Lab, case: Case, layout: Layout, rank: int) -> Tensor:
    tokens = padded(lab.adapter, {}, batch(case))[1]
    return torch.cat([call.valid_BL for call in cut(tokens, layout, rank)])


def evaluation(lab: Lab, case: Case, layout: Layout) -> str:
    """I6: evaluation draws nothing: whatever the state of the generator, the same bits."""
    case = dataclasses.replace(case, draws=True)
    reason = lab.adapter.refusal(case, layout)
    if reason:
        raise NotSupportedError(reason)
    once, again = (lab.run(layout, case, mode="eval", rng=seed) for seed in (0, 1))
    differs = sum(
        int((one.output_BLD != other.output_BLD).any(-1).sum())
        for one, other in zip(once, again, strict=True)
    )
    total = case.sequences * case.length
    require(differs == 0, f"{layout}: outputs of {differs} of {total} tokens changed with the seed")
    return f"{total} tokens"


def ties(lab: Lab, case: Case, layout: Layout) -> str:
    """I7: ties go to the lowest expert and token; recomputation routes as the forward pass did."""
    plain, again = lab.run(layout, case), lab.run(layout, case, recompute=True)
    for rank, (one, other) in enumerate(zip(plain, again, strict=True)):
        for name, grad in one.grads.items():
            same = is_close(other.grads[name], grad, case.dtype)
            require(same, f"recomputed on rank {rank}: {name} {ratio(other.grads[name], grad)}")
        if one.load_E is not None and other.load_E is not None:
            require(torch.equal(one.load_E, other.load_E), "recomputation changes the counts")
    seen = ["recomputation replays"]
    if case.chooses != "fixed":
        seen.append(_tied_choices(lab, case, layout))
    return ", ".join(seen)


def _tied_choices(lab: Lab, case: Case, layout: Layout) -> str:
    routes = [
        shown(lab.adapter, "routes", rank.routes)
        for rank in lab.run(layout, case, tied, mode="eval")
    ]
    expert_TK = torch.cat([r.expert_TK for r in routes])
    placed_TK = torch.cat([r.placed_TK for r in routes])
    if case.chooses != "tokens":
        wrong_T = (expert_TK != torch.arange(expert_TK.shape[1])).any(1)
        chosen = sorted(set(map(tuple, expert_TK[wrong_T].tolist())))[:2]
        require(not wrong_T.any(), f"{int(wrong_T.sum())} of {len(wrong_T)} tied tokens: {chosen}")
    # of those that lost to others, none comes before one that kept the same expert
    kept_GS = (placed_TK >= 0).any(1).view(-1, group_size(lab, case, layout))
    is_prefix = (kept_GS.long().diff(dim=1) <= 0).all()
    lost = [group.nonzero().flatten().tolist() for group in kept_GS[:1]]
    require(is_prefix, f"of tied tokens these were kept in the first group: {lost[0]}")
    return "lowest index first"


def group_size(lab: Lab, case: Case, layout: Layout) -> int:
    """Tokens of a routing group."""
    if lab.adapter.group == "sequence":
        return case.length
    return case.sequences * case.length // (layout.ranks * layout.calls)


def capacity(lab: Lab, case: Case, layout: Layout) -> str:
    """I12: no expert takes more than ⌈factor·K·S/E⌉ of a group; the effective factor is told."""
    if case.capacity_factor is None:
        raise NotSupportedError("dropless")
    size = group_size(lab, case, layout)
    demand = Fraction(str(case.capacity_factor)) * case.top_k * size / case.experts
    slots = min(size, max(1, math.ceil(demand)))
    ranks = lab.run(layout, case)
    if ranks[0].routes is not None:
        for rank in ranks:
            most = _most_placed(shown(lab.adapter, "routes", rank.routes), case, size)
            require(most <= slots, f"an expert took {most} of a group; its capacity is {slots}")
    effective = shown(lab.adapter, "effective_factor", ranks[0].effective_factor)
    expected = slots * case.experts / (case.top_k * size)
    if case.chooses == "tokens":  # what experts take fills their slots
        expected = 1.0
    same = is_close(effective, expected, torch.float32)
    require(same, f"effective factor {effective:.6g} reported, {expected:.6g} provided")
    return f"factor {case.capacity_factor:g}: {slots} slots, effective {effective:.4g}"


def _most_placed(routes: Routes, case: Case, size: int) -> int:
    placed_GN = routes.placed_TK.reshape(-1, size * routes.placed_TK.shape[1])
    counts = [row[row >= 0].bincount(minlength=case.experts).max() for row in placed_GN]
    return int(max(counts, default=torch.tensor(0)))


def precision(lab: Lab, case: Case, layout: Layout) -> str:
    """I14: under bf16 the router chooses by logits of fp32 at least, and counts are int64.

    Logits in bf16 would send some of 1024 tokens to other experts than exact ones.
    """
    case = lab.without_drops(case, layout)
    case = dataclasses.replace(case, dtype=torch.bfloat16, sequences=32, length=32)
    reason = lab.adapter.refusal(case, layout)
    if reason:
        raise NotSupportedError(reason)
    ranks = lab.run(layout, case, unbiased, mode="eval")
    seen = []
    if case.chooses == "logits":
        expert_TK = torch.cat([shown(lab.adapter, "routes", r.routes).expert_TK for r in ranks])
        wrong = int((expert_TK != _exact_choices(lab, case, layout)).any(1).sum())
        require(wrong == 0, f"{wrong} of {len(expert_TK)} tokens chose otherwise than exact logits")
        seen.append(f"{len(expert_TK)} choices exact")
    load_E = shown(lab.adapter, "load_E", ranks[0].load_E)
    require(load_E.dtype == torch.int64, f"counts are {load_E.dtype}")
    return ", ".join([*seen, "counts int64"])


def _exact_choices(lab: Lab, case: Case, layout: Layout) -> Tensor:
    state = given_state(lab.ranks(layout, initial_state, case)[0])
    weight_ED = state[lab.adapter.router(0)].double()
    logits_TE = batch(case).x_BLD.flatten(0, 1).double() @ weight_ED.T
    return logits_TE.topk(case.top_k, dim=1).indices


def extremes(lab: Lab, case: Case, layout: Layout) -> str:
    """I15: more slots than tokens, K·factor > E and K = E work like any other case."""
    variants = {
        "C > S": dataclasses.replace(case, capacity_factor=100.0 * case.experts),
        "K·factor > E": dataclasses.replace(case, capacity_factor=case.experts / case.top_k + 1),
        "K = E": dataclasses.replace(case, top_k=case.experts),
        "one token a group": dataclasses.replace(
            case, sequences=layout.ranks * layout.calls, length=1
        ),
    }
    seen = []
    for what, variant in variants.items():
        if lab.adapter.refusal(variant, layout):
            continue
        for mode in ("train", "eval"):
            for rank in lab.run(layout, variant, mode=mode):
                values = [rank.output_BLD, torch.tensor(rank.loss), *rank.grads.values()]
                finite = all(bool(value.isfinite().all()) for value in values)
                require(finite, f"{what}: not finite")
        seen.append(what)
    if not seen:
        raise NotSupportedError("every such case is refused")
    return ", ".join(seen)


def layer_losses(lab: Lab, case: Case, layout: Layout) -> str:
    """I16: two layers that collapse onto different experts look as bad as onto the same."""
    if case.chooses != "logits":
        raise NotSupportedError("the gate cannot be made to collapse by its logits alone")
    case = dataclasses.replace(case, layers=2)
    edits = collapsed, collapsed_apart
    same, apart = (lab.run(layout, case, edit, mode="eval")[0] for edit in edits)
    one = shown(lab.adapter, "auxiliary", same.auxiliary)
    other = shown(lab.adapter, "auxiliary", apart.auxiliary)
    require(
        is_close(other, one, torch.float32),
        f"two layers collapsed onto one expert lose {one:.6g}, onto different ones {other:.6g}",
    )
    return f"balance loss {one:.4g} either way"
