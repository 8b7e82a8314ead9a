"""Invariants about layouts: the same numbers however the work is spread (I1-I3, I8-I11, I13)."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from moetrain.testing.conformance.adapter import ALONE, Case, Layout, Pass
from moetrain.testing.conformance.batches import (
    Edit,
    few_sequences,
    last_half_padded,
    more_padding,
    plain,
    starved,
)
from moetrain.testing.conformance.lab import Lab, initial_state, restore, save
from moetrain.testing.conformance.verdict import (
    InvariantError,
    NotExposedError,
    NotSupportedError,
    is_close,
    ratio,
    require,
    shown,
)


def gradients(lab: Lab, case: Case, layout: Layout) -> str:
    """I1: every parameter's gradient is the one-process reference's, on every rank."""
    (expected,) = lab.run(lab.reference(layout), case)
    for rank, actual in enumerate(lab.run(layout, case)):
        _same_gradients(actual, expected, case.dtype, f"rank {rank} of {layout}")
    return f"{len(expected.grads)} parameters"


def _same_gradients(actual: Pass, expected: Pass, dtype: torch.dtype, where: str) -> None:
    for name, grad in expected.grads.items():
        require(name in actual.grads, f"{where}: {name} has no gradient")
        mine = actual.grads[name]
        if not is_close(mine, grad, dtype):
            raise InvariantError(f"{where}: gradient of {name} is {ratio(mine, grad)}")


def norm(lab: Lab, case: Case, layout: Layout) -> str:
    """I2: one global gradient norm, the same on all ranks, of the one-process gradient."""
    (expected,) = lab.run(lab.reference(layout), case)
    right = sum(g.double().square().sum().item() for g in expected.grads.values()) ** 0.5
    ranks = lab.run(layout, case)
    norms = [shown(lab.adapter, "grad_norm", rank.grad_norm) for rank in ranks]
    seen = ", ".join(f"{value:.6g}" for value in norms[:4])
    agree = all(is_close(value, right, case.dtype) for value in norms)
    require(agree, f"{layout}: norms {seen}; the whole gradient's is {right:.6g}")
    return f"{right:.6g}"


def losses(lab: Lab, case: Case, layout: Layout) -> str:
    """I3: losses and outputs do not depend on layout, micro-batches, recomputation, padding."""
    (expected,) = lab.run(ALONE, case)
    other = dataclasses.replace(layout, calls=2 * layout.calls)
    seen = [_same_losses(lab, case, expected, layout)]
    if case.sequences % (other.ranks * other.calls) == 0:
        seen.append(_same_losses(lab, case, expected, other))
    seen.append(_same_losses(lab, case, expected, layout, recompute=True))
    if lab.adapter.padding(case) is None:
        seen.append(_same_losses(lab, case, expected, layout, more_padding))
    wrong = [text for text in seen if text]
    note = "" if lab.adapter.group == "sequence" else "capacity and balance are per rank and call; "
    require(not wrong, note + "; ".join(wrong))
    return f"loss {expected.loss:.6g}"


def _same_losses(
    lab: Lab,
    case: Case,
    expected: Pass,
    layout: Layout,
    edit: Edit = plain,
    recompute: bool = False,
) -> str:
    """What differs from one process and one call; empty when nothing does."""
    ranks = lab.run(layout, case, edit, recompute=recompute)
    output_BLD = torch.cat([rank.output_BLD for rank in ranks])[: len(expected.output_BLD)]
    pairs = [("loss", ranks[0].loss, expected.loss)]
    if expected.auxiliary is not None and ranks[0].auxiliary is not None:
        pairs.append(("balance loss", ranks[0].auxiliary, expected.auxiliary))
    wrong = [f"{n} {a:.6g}, not {e:.6g}" for n, a, e in pairs if not is_close(a, e, case.dtype)]
    if not is_close(output_BLD, expected.output_BLD, case.dtype):
        differs_BL = ((output_BLD - expected.output_BLD).abs() > 1e-4).any(-1)
        wrong.append(f"outputs of {int(differs_BL.sum())} of {differs_BL.numel()} tokens differ")
    how = ", recomputed" if recompute else ""
    how += "" if edit is plain else f", {edit.__name__.replace('_', ' ')}"
    return f"{layout}{how}: {', '.join(wrong)}" if wrong else ""


def keyed_draws(lab: Lab, case: Case, layout: Layout) -> str:
    """I8: what is drawn for a token depends on seed, step and token alone, not on the layout."""
    case = dataclasses.replace(case, draws=True)
    reason = lab.adapter.refusal(case, layout)
    if reason:
        raise NotSupportedError(reason)
    (expected,) = lab.run(lab.reference(layout), case)
    alone = shown(lab.adapter, "routes", expected.routes)
    ranks = [shown(lab.adapter, "routes", rank.routes) for rank in lab.run(layout, case)]
    placed_TK = torch.cat([routes.placed_TK for routes in ranks])
    differs_T = (placed_TK != alone.placed_TK).any(1)
    require(
        not differs_T.any(),
        f"{layout}: {int(differs_T.sum())} of {len(differs_T)} tokens go to other experts than in "
        "one process with the same seed",
    )
    return f"{len(differs_T)} tokens"


def nothing_to_do(lab: Lab, case: Case, layout: Layout) -> str:
    """I9: a rank or an expert without tokens: no hang, gradient zero rather than none."""
    seen = []
    if layout.ranks > 1:
        variants = dict.fromkeys((case, lab.without_drops(case, layout)))
        wrong = [text for variant in variants if (text := _idle_ranks(lab, variant, layout))]
        require(not wrong, "; ".join(wrong))
        seen.append("idle ranks")
    if case.chooses in ("logits", "groups"):
        for rank in lab.run(layout, case, starved):
            _starved_gradients(lab, rank)
        seen.append("idle expert")
    if not seen:
        raise NotSupportedError("no rank and no expert can be idle here")
    return ", ".join(seen)


def _idle_ranks(lab: Lab, case: Case, layout: Layout) -> str:
    """What goes wrong when some ranks have nothing to do; empty when nothing does."""
    where = f"{layout}, some ranks without tokens, {case}"
    idle = few_sequences if lab.adapter.padding(case) else last_half_padded
    try:
        ranks = lab.run(layout, case, idle)
    except Exception as error:
        return f"{where}: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    wrong = [number for number, rank in enumerate(ranks) if not _is_finite(rank)]
    if wrong:
        return f"{where}: loss, outputs or gradients of ranks {wrong} are not finite"
    if lab.adapter.group == "sequence":
        (expected,) = lab.run(ALONE, case, idle)
        for rank, actual in enumerate(ranks):
            _same_gradients(actual, expected, case.dtype, f"{where}, rank {rank}")
    return ""


def _is_finite(rank: Pass) -> bool:
    values = [rank.output_BLD, torch.tensor(rank.loss), *rank.grads.values()]
    return all(bool(value.isfinite().all()) for value in values)


def _starved_gradients(lab: Lab, rank: Pass) -> None:
    names = [name for name in rank.grads if name.startswith(lab.adapter.experts(0))]
    require(bool(names), "an expert without tokens has no gradient")
    for name in names:
        last, others = rank.grads[name][-1], rank.grads[name][:-1]
        require(not last.any(), f"{name}: gradient {last.norm():.4g} for an expert without tokens")
        require(bool(others.any()), f"{name}: no expert has a gradient")


def dispatchers(lab: Lab, case: Case, layout: Layout) -> str:
    """I10: slots for all give what dropless gives; ranks drop the tokens that one process drops."""
    seen = ["the same outputs", *_enough_slots(lab, case, layout)]
    (expected,) = lab.run(lab.reference(layout), case)
    ranks = lab.run(layout, case)
    output_BLD = torch.cat([rank.output_BLD for rank in ranks])
    same = is_close(output_BLD, expected.output_BLD, case.dtype)
    require(same, f"{layout}: outputs {ratio(output_BLD, expected.output_BLD)}")
    if expected.routes is not None:
        placed_TK = torch.cat([shown(lab.adapter, "routes", r.routes).placed_TK for r in ranks])
        differs_T = (placed_TK != expected.routes.placed_TK).any(1)
        require(not differs_T.any(), f"{layout}: {int(differs_T.sum())} tokens dropped otherwise")
        seen.append("the same tokens dropped")
    return ", ".join(seen)


def _enough_slots(lab: Lab, case: Case, layout: Layout) -> list[str]:
    enough = dataclasses.replace(case, capacity_factor=float(case.experts))
    dropless = dataclasses.replace(case, capacity_factor=None)
    if any(lab.adapter.refusal(variant, layout) for variant in (enough, dropless)):
        return []  # there is one executor alone
    for actual, expected in zip(lab.run(layout, enough), lab.run(layout, dropless), strict=True):
        same = is_close(actual.output_BLD, expected.output_BLD, case.dtype)
        require(same, f"{layout}: outputs with slots for all differ from dropless")
        _same_gradients(actual, expected, case.dtype, f"{layout}, slots for all against dropless")
    return ["slots for all equal dropless"]


def portable_state(lab: Lab, case: Case, layout: Layout) -> str:
    """I11: a checkpoint of one layout, read at others, is the same experts by global id."""
    for method in ("save", "restore"):
        if method in lab.adapter.hidden:
            raise NotExposedError(lab.adapter.hidden[method])
    others = {ALONE, Layout(layout.ranks, ep=1), Layout(layout.ranks, layout.ep)}
    with tempfile.TemporaryDirectory() as folder:
        saved = lab.ranks(layout, save, case, Path(folder))
        for other in sorted(others, key=str):
            read = lab.ranks(other, restore, case, Path(folder))
            _same_state(saved[0].state, read[0].state, f"saved at {layout}, read at {other}")
            if lab.adapter.group == "sequence" or case.capacity_factor is None:
                before, after = (
                    torch.cat([s.output.output_BLD for s in side]) for side in (saved, read)
                )
                same = is_close(after, before, case.dtype)
                require(same, f"saved at {layout}, read at {other}: other outputs")
    return f"from {layout} to {len(others)} layouts"


def _same_state(saved: dict[str, Tensor], read: dict[str, Tensor], where: str) -> None:
    require(set(saved) == set(read), f"{where}: names {set(saved) ^ set(read)}")
    for name, value in saved.items():
        if not torch.equal(read[name], value):
            wrong = [
                i for i, (a, b) in enumerate(zip(read[name], value, strict=True)) if (a != b).any()
            ]
            raise InvariantError(f"{where}: {name} differs in rows {wrong}")


def initialisation(lab: Lab, case: Case, layout: Layout) -> str:
    """I13: experts start distinct, and at every layout from the same values."""
    (alone,) = lab.ranks(ALONE, initial_state, case)
    ranks = lab.ranks(layout, initial_state, case)
    wrong = [*_equal_experts(lab, ranks[0], layout)]
    for rank, state in enumerate(ranks):
        differing = [n for n, value in alone.items() if not torch.equal(state[n], value)]
        if differing:
            wrong.append(f"rank {rank} of {layout} starts from other {', '.join(differing)}")
            break
    require(not wrong, "; ".join(wrong))
    return f"{case.experts} experts"


def _equal_experts(lab: Lab, state: dict[str, Tensor], layout: Layout) -> list[str]:
    weights = [v.flatten(1) for n, v in state.items() if n.startswith(lab.adapter.experts(0))]
    rows = [tuple(row.tolist()) for row in torch.cat(weights, dim=1)]
    if len(set(rows)) == len(rows):
        return []
    twins = [i for i, row in enumerate(rows) if rows.index(row) < i]
    return [f"{layout}: experts {twins} equal an earlier one"]
