"""Which invariants hold, for moetrain and for DeepSpeed, and what combinations moetrain supports.

    python benchmarks/conformance.py

Runs the conformance suite (`moetrain.testing.conformance`) on moetrain's gates with simulated ranks
and on DeepSpeed's MoE layer with Gloo processes, all on CPU. Writes conformance.{json,md} into
results/, docs/support.md and the table in README.md. Takes some minutes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import record
from adapters import own, peer
from adapters.pools import Pools

from moetrain.testing.conformance import (
    ALONE,
    INVARIANTS,
    Case,
    Lab,
    Layout,
    Order,
    check,
    check_all,
)

PAGE = record.ROOT / "docs" / "support.md"
README = record.ROOT / "README.md"
SIZES = (1, 2, 4, 8, 16, 64)
POLICIES = ("position", "probability", "random", "spill", "dropless")
OWN_LAYOUTS = (Layout(2, 2), Layout(4, 4), Layout(4, 2, calls=2))
ENGINE_LAYOUTS = (Layout(2, 2), Layout(4, 2))
ENGINE = ("I1", "I2", "I3", "I11", "I13")
"""What the engine has a part in."""
PEER_LAYOUTS = (Layout(2, 2), ALONE, Layout(4, 4), Layout(4, 2))

KNOWN = (
    ("expert gradients P times too large", "DeepSpeed #5618, #6545", "I1"),
    ("global gradient norm wrong with experts", "DeepSpeed #8475", "I2"),
    ("random choices at evaluation", "", "I6"),
    ("gates renormalised after drops", "", "I4"),
    ("ranks without tokens hang", "DeepSpeed #4808, #5066, #7461", "I9"),
    ("identical experts at the start", "", "I13"),
    ("the same experts loaded on two ranks", "DeepSpeed #6589", "I11"),
    ("counts in int32", "DeepSpeed #8261", "I14"),
    ("more choices than tokens fail", "DeepSpeed #5353", "I15"),
)
"""Defects that DeepSpeed had or has, where they are reported, and the invariant they break."""

READ = "0.19.8"
"""The version of DeepSpeed in which the causes were looked up."""
CAUSES = """\
## Why

Read in DeepSpeed {version}{other}; where a function is named, seen again by calling it:

- I2: without ZeRO, in fp32, `clip_grad_norm_` (runtime/utils.py) takes each rank's norm, of the
  router and of its own experts, and averages the norms over the ranks. ZeRO 1 is right.
- I3: a rank's call is the routing group, so what is dropped and what is balanced change with the
  layout. That is its definition of capacity (ours with `moe.group: microbatch`), not an error.
- I4: drops are not counted. `top2gating` and `topkgating` divide gates by their sum after the
  drops: a token that lost its second expert gets weight 1 for the first, where GShard's Algorithm 1
  has g1/(g1 + g2).
- I5: `top1gating` masks choices by `used_token`, but the mean probability in its balance loss is
  over all tokens; for k > 1 `used_token` is not passed on.
- I6: `use_rts` and `top2_2nd_expert_sampling`, both on by default, do not look at `training`.
- I7: `torch.topk` over a 0/1 mask (k = 1) and over gates (k > 2) leaves the order of ties open.
- I8: what is drawn comes from the rank's generator.
- I9: with drops, capacity follows from the rank's own number of tokens, so ranks with different
  numbers exchange buffers of different sizes, and Gloo aborts. Dropless, the ranks agree on one.
- I12: nothing tells the effective factor; no expert takes more than its capacity.
- I13: `Experts` deep-copies one module.

I11 reads back the weights of its checkpoint (`load_module_only`), not its optimizer's state.
"""


class Row(NamedTuple):
    """One verdict."""

    gate: str
    layout: str
    invariant: str
    status: str
    detail: str


def main() -> None:
    argparse.ArgumentParser(description="The conformance suite on every gate.").parse_args()
    systems = {"moetrain": own_rows()}
    with Pools() as pools:
        for stage in (0, 1):
            adapter = peer.Peer(stage)
            name = f"{adapter.name} {adapter.version}, ZeRO {stage}"
            lab = Lab(adapter, pools, timeout=60)
            cases = [peer.case(gate) for gate in peer.GATES]
            systems[name] = rows(lab, cases, PEER_LAYOUTS)
    data: dict[str, Any] = {"systems": systems, "support": support()}
    print(record.write("conformance", data, report(systems), device="cpu"))
    PAGE.write_text(support_page(data), encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), data), encoding="utf-8")


def own_rows() -> list[Row]:
    cases = [own.case(gate) for gate in own.GATES]
    found = rows(Lab(own.Own()), cases, OWN_LAYOUTS, [i for i in INVARIANTS if i != "I11"])
    return found + rows(Lab(own.Own("engine")), cases, ENGINE_LAYOUTS, ENGINE)


def rows(
    lab: Lab, cases: Sequence[Case], layouts: Sequence[Layout], which: Iterable[str] = INVARIANTS
) -> list[Row]:
    """Every verdict."""
    found = []
    for layout in layouts:
        for case in cases:
            for invariant, verdict in check_all(lab, case, layout, which).items():
                found.append(Row(case.gate, str(layout), invariant, *verdict))
                print(*found[-1], file=sys.stderr)
    return found


# ---- what moetrain supports ----------------------------------------------------------------------


def support() -> list[dict[str, Any]]:
    """Every gate and policy: the EP sizes at which it equals one process, or why it is refused."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for size in SIZES:
        for gate in own.GATES:
            for policy, holds, refused in _supported(gate, Layout(max(2, size), size)):
                entry = found.setdefault(
                    (gate, policy), {"gate": gate, "policy": policy, "ep": [], "refused": refused}
                )
                entry["ep"] += [size] if holds else []
    return list(found.values())


def _supported(gate: str, layout: Layout) -> list[tuple[str, bool, str | None]]:
    """Every policy at one layout: whether it equals one process, and why it is refused."""
    lab = Lab(own.Own(), timeout=600)
    cases = {policy: _combination(gate, policy, max(8, layout.ranks)) for policy in POLICIES}
    refused = {policy: lab.adapter.refusal(case, layout) for policy, case in cases.items()}
    orders = [Order(case) for policy, case in cases.items() if refused[policy] is None]
    for where in (layout, ALONE):
        lab.prepare(where, orders)
    return [
        (policy, refused[policy] is None and _same_as_alone(lab, case, layout), refused[policy])
        for policy, case in cases.items()
    ]


def _combination(gate: str, policy: str, size: int) -> Case:
    dropless = policy == "dropless"
    return own.case(
        gate,
        experts=size,
        sequences=size,
        capacity_factor=None if dropless else 1.0,
        drop_policy="position" if dropless else policy,
    )


def _same_as_alone(lab: Lab, case: Case, layout: Layout) -> bool:
    verdicts = [check(invariant, lab, case, layout) for invariant in ("I1", "I2", "I8")]
    print(case, layout, *verdicts, file=sys.stderr)
    return all(verdict.status == "holds" for verdict in verdicts)


SUPPORT = """\
# What works together

Written by `python benchmarks/conformance.py` from what ran: a number is an expert-parallel size at
which gradients of every parameter, the global gradient norm and every token's experts were those of
one process, in fp64 on simulated ranks (command and machine:
[benchmarks/results/conformance.md](../benchmarks/results/conformance.md)). Size 1 dispatches within
the rank (`Local`), every other by all-to-all (`AllToAll`). The columns but the last have a capacity
(`moe.capacity_factor`) and the drop policy named; `dropless` is a capacity factor of null.
"""


def support_page(results: dict[str, Any]) -> str:
    """The text of docs/support.md."""
    entries = {(entry["gate"], entry["policy"]): entry for entry in results["support"]}
    reasons: list[str] = []
    lines = []
    for gate in dict.fromkeys(gate for gate, _ in entries):
        lines.append([f"`{gate}`", *(_cell(entries[gate, p], reasons) for p in POLICIES)])
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, 1)]
    header = ["gate (`moe.router`)", *(f"`{policy}`" for policy in POLICIES)]
    refused = "Refused before a run starts, with the message:"
    return "\n".join([SUPPORT, record.table(header, lines), "", refused, "", *notes]) + "\n"


def _cell(entry: dict[str, Any], reasons: list[str]) -> str:
    if entry["refused"] is None:
        return " ".join(map(str, entry["ep"])) or "none"
    reason = entry["refused"].replace("\n", "; ")
    if reason not in reasons:
        reasons.append(reason)
    return f"refused ({reasons.index(reason) + 1})"


# ---- the comparison ------------------------------------------------------------------------------


INTRODUCTION = """\
# Conformance: which invariants hold

Every invariant is a function of `moetrain.testing.conformance`
([docs/conformance.md](../../docs/conformance.md)); every verdict, gate by gate and layout by
layout, stands in `conformance.json`. A cell shows what was seen first, at 2 ranks with EP 2 where
it fails there.

moetrain: {gates} gates, simulated ranks, fp64. DeepSpeed: deepspeed.moe.layer.MoE with k = 1, 2
and 4 (`top1`, `top2`, `topk`) under its own engine, Gloo processes, fp32, EP 1, 2 and 4, AdamW with
ZeRO stages 0 and 1. Converted first: `min_capacity` is 1, a capacity factor means slots over K·S/E
on both sides, the reference for DeepSpeed is one process with the same calls (its routing group is
a rank's call) but in I3, and its random choices (`use_rts`, `top2_2nd_expert_sampling`) are off but
in I6 and I8, which are about them.
"""


def report(systems: dict[str, list[Row]]) -> str:
    lines = []
    for invariant in INVARIANTS:
        cells: list[str] = []
        for found in systems.values():
            cell = summary([row for row in found if row.invariant == invariant])
            cells.append("as to its left" if cell != "holds" and cell in cells[-1:] else cell)
        lines.append([_title(invariant), *cells])
    table = record.table(["invariant", *systems], lines)
    head = INTRODUCTION.format(gates=len(own.GATES))
    installed = peer.Peer().version
    other = "" if installed == READ else f" (and not in {installed}, which is installed)"
    causes = CAUSES.format(version=READ, other=other)
    return "\n".join([head, table, "", *known(systems), "", causes])


def _title(invariant: str) -> str:
    return " ".join((INVARIANTS[invariant].__doc__ or "").split("\n\n")[0].split())


def with_table(text: str, results: dict[str, Any]) -> str:
    """The text with its table of verdicts, between two marks, brought up to date."""
    begin, end = "<!-- conformance -->\n", "<!-- /conformance -->"
    before, rest = text.split(begin)
    systems = {n: [Row(*row) for row in found] for n, found in results["systems"].items()}
    lines = [
        [_title(i), *(_brief([r for r in found if r.invariant == i]) for found in systems.values())]
        for i in INVARIANTS
    ]
    table = record.table(["invariant", *systems], lines)
    return f"{before}{begin}{table}\n{end}{rest.split(end)[1]}"


def _brief(found: Sequence[Row]) -> str:
    """Every verdict of an invariant, and for how many gates it is so."""
    gates = list(dict.fromkeys(row.gate for row in found))
    worst = [_worst([row for row in found if row.gate == gate]).status for gate in gates]
    counts = {status: worst.count(status) for status in dict.fromkeys(worst)}
    if len(counts) == 1:
        return worst[0]
    return ", ".join(f"{status} ({count} of {len(gates)})" for status, count in counts.items())


def summary(found: Sequence[Row]) -> str:
    """One cell: gates with the same worst verdict together."""
    by_verdict: dict[tuple[str, str], list[str]] = {}
    for gate in dict.fromkeys(row.gate for row in found):
        worst = _worst([row for row in found if row.gate == gate])
        detail = "" if worst.status == "holds" else f": {worst.detail}"
        by_verdict.setdefault((worst.status, detail), []).append(gate)
    if list(by_verdict) == [("holds", "")]:
        return "holds"
    return "<br>".join(
        f"{', '.join(gates)}: **{status}**{_short(detail)}"
        for (status, detail), gates in by_verdict.items()
    )


def _worst(found: Sequence[Row]) -> Row:
    order = ("fails", "not exposed", "holds", "not supported")
    return min(found, key=lambda row: order.index(row.status))


def _short(detail: str, most: int = 260) -> str:
    text = detail.replace("\n", " ").replace("|", "/")
    return text if len(text) <= most else text[:most].rsplit(" ", 1)[0] + " …"


def known(systems: dict[str, list[Row]]) -> list[str]:
    """The defects reported of DeepSpeed, and what this version does."""
    names = [name for name in systems if name != "moetrain"]
    lines = [
        [defect, issues or "by running it", invariant]
        + [_statuses([r for r in systems[name] if r.invariant == invariant]) for name in names]
        for defect, issues, invariant in KNOWN
    ]
    header = ["defect", "reported", "invariant", *names]
    return ["## Known defects of DeepSpeed, and this version", "", record.table(header, lines)]


def _statuses(found: Sequence[Row]) -> str:
    by_status: dict[str, list[str]] = {}
    for gate in dict.fromkeys(row.gate for row in found):
        by_status.setdefault(_worst([r for r in found if r.gate == gate]).status, []).append(gate)
    if len(by_status) == 1:
        return next(iter(by_status))
    return "; ".join(f"{', '.join(gates)}: {status}" for status, gates in by_status.items())


if __name__ == "__main__":
    main()
