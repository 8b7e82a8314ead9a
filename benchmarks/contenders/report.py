"""What `benchmarks/layer.py` measured, in Markdown."""

from __future__ import annotations

from typing import Any

import operators
import record
from harness import Spread, ratio

from contenders.cell import Cell, Shape

LIMIT, OWN, DROPLESS = "limit", "moetrain", "moetrain dropless"
NO_PEERS = ("limit", "limit, given memory", OWN, DROPLESS)
LEAST_SHARE, LEAST_SHARE_FEW, FEW_TOKENS = 0.90, 0.85, 2048
"""Targets: of the limit, where there are more tokens than a few, and where there are not."""
LEAST_SPEED, LEAST_SPEED_DEEPSPEED, MANY_TOKENS = 1.25, 2.0, 32_768
"""Times the fastest peer; times DeepSpeed where there are many tokens."""
MOST_MEMORY = 1.0
"""Times the leanest peer's."""


def report(cells: list[dict[str, Any]]) -> str:
    """A summary, and a table for every cell; those of one machine and dtype stand together."""
    cells = sorted(cells, key=_order)
    return "\n".join(["# One MoE layer, forward and backward", "", *_summary(cells), *_all(cells)])


def useful_rate(systems: dict[str, Any], name: str, over: str) -> Spread:
    """Useful FLOP/s of one system by those of another, round by round."""
    one, other = systems[name], systems[over]
    quotient = ratio(other["seconds"], one["seconds"])
    scale = one["flops"] / other["flops"]
    return Spread(*(scale * number for number in quotient))


def fastest_peer(systems: dict[str, Any]) -> str | None:
    """Of those that compute what they should; by the median share of the limit."""
    peers = [name for name in systems if _is_ranked(systems, name)]
    shares = {name: useful_rate(systems, name, LIMIT).median for name in peers}
    return max(peers, key=lambda name: shares[name]) if peers else None


def leanest_peer(systems: dict[str, Any]) -> str | None:
    """The one whose step takes least memory."""
    peers = [name for name in systems if _is_ranked(systems, name)]
    return min(peers, key=lambda name: systems[name]["peak_bytes"]) if peers else None


def _is_ranked(systems: dict[str, Any], name: str) -> bool:
    entry = systems[name]
    return name not in NO_PEERS and "absent" not in entry and not entry["wrong"]


def _cell(entry: dict[str, Any]) -> Cell:
    kept = entry["cell"]
    return Cell(**{**kept, "shape": Shape(**kept["shape"])})


def _summary(cells: list[dict[str, Any]]) -> list[str]:
    header = [
        "layer", "EP", "tokens", "routing", "dtype", "on", "moetrain: share of the limit",
        "dropless", "fastest peer", "moetrain ÷ it", "dropless ÷ it", "leanest peer",
        "memory of moetrain ÷ it", "dropless ÷ it",
    ]  # fmt: skip
    rows = [
        [*_place(_cell(entry)), _device(entry), *_standing(_cell(entry), entry["systems"])]
        for entry in cells
    ]
    few, others = f"{LEAST_SHARE_FEW} (of {FEW_TOKENS:,} tokens)", f"{LEAST_SHARE} (of more)"
    targets = (
        f"at least {few} or {others} of the limit, {LEAST_SPEED} times the fastest peer and, of "
        f"{MANY_TOKENS:,} tokens, {LEAST_SPEED_DEEPSPEED:g} times DeepSpeed; no more memory than "
        "the leanest peer. They were set for 8 experts in bf16 on AMX, and are marked everywhere"
    )
    return [SUMMARY.format(targets=targets), "", record.table(header, rows), ""]


def _order(entry: dict[str, Any]) -> tuple[Any, ...]:
    shape, ranks, tokens, routing, dtype = _place(_cell(entry))
    return _device(entry), dtype, shape.experts, ranks, tokens, routing


def _device(entry: dict[str, Any]) -> str:
    return entry.get("gpu", entry["instructions"])


def _place(cell: Cell) -> list[Any]:
    return [cell.shape, cell.ranks, cell.tokens, cell.routing, cell.dtype]


def _standing(cell: Cell, systems: dict[str, Any]) -> list[str]:
    fastest, leanest = fastest_peer(systems), leanest_peer(systems)
    mine = [name for name in (OWN, DROPLESS) if name in systems]
    wanted = LEAST_SHARE if cell.tokens > FEW_TOKENS else LEAST_SHARE_FEW
    shares = [_at_least(wanted, useful_rate(systems, name, LIMIT)) for name in mine]
    row = [*shares, *["–"] * (2 - len(mine))]
    for peer, how in ((fastest, _speed), (leanest, _memory)):
        found = [how(systems, name, peer) for name in mine] if peer else []
        row += [peer or "–", *found, *["–"] * (2 - len(found))]
    return row


def _speed(systems: dict[str, Any], name: str, peer: str) -> str:
    return _at_least(LEAST_SPEED, useful_rate(systems, name, peer))


def _memory(systems: dict[str, Any], name: str, peer: str) -> str:
    times = systems[name]["peak_bytes"] / max(1, systems[peer]["peak_bytes"])
    return _marked(f"{times:.2f}", is_short=round(times, 2) > MOST_MEMORY)


def _at_least(wanted: float, found: Spread) -> str:
    return _marked(found.show(), is_short=round(found.median, 2) < wanted)


def _marked(text: str, is_short: bool) -> str:
    return f"**{text}**" if is_short else text


def _all(cells: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in cells:
        cell = _cell(entry)
        lines += [f"## {cell}", "", _table(cell, entry["systems"]), "", _where(entry), ""]
        for name, found in entry.get("profiles", {}).items():
            lines += [f"Where {name} spends its time:", "", operators.table(found), ""]
        missing = {n: e["absent"] for n, e in entry["systems"].items() if "absent" in e}
        wrong = {n: e["wrong"] for n, e in entry["systems"].items() if e.get("wrong")}
        for name, reason in {**missing, **wrong}.items():
            lines += [f"- {name}: {reason}."]
        lines += [""] if missing or wrong else []
    return lines


def _where(entry: dict[str, Any]) -> str:
    """Cells may have been measured at different times and places."""
    cpu = f"{entry['cores']} cores of {entry['processor']} ({entry['instructions']})"
    place = [entry["date"], f"commit {entry['commit']}", entry.get("gpu", cpu)]
    return f"{', '.join([*place, *entry.get('versions', [])])}."


def _table(cell: Cell, systems: dict[str, Any]) -> str:
    header = [
        "system", "ms", "share of the limit", "speed ÷ moetrain's", "MiB a step takes", "dropped",
    ]  # fmt: skip
    rows = []
    for name, entry in systems.items():
        if "absent" in entry:
            continue
        milliseconds = sorted(1e3 * second for second in entry["seconds"])
        dropped = 1 - entry["kept"] / entry["assigned"]
        share, speed = (useful_rate(systems, name, over) for over in (LIMIT, OWN))
        is_near = name == "DeepSpeed" and speed.median > 1 / LEAST_SPEED_DEEPSPEED
        is_short = is_near and cell.tokens >= MANY_TOKENS
        compared = [share.show(), _marked(speed.show(), is_short)]
        rows.append(
            [
                f"{name} ({entry['remark']})" if entry["remark"] else name,
                f"{milliseconds[len(milliseconds) // 2]:.1f}",
                *(["not ranked"] * 2 if entry["wrong"] else compared),
                f"{entry['peak_bytes'] / 2**20:.0f}",
                f"{dropped:.1%}",
            ]
        )
    return record.table(header, rows)


SUMMARY = """\
Useful FLOP/s: those of the experts' three matrix products and their gradients on rows that are not
dropped, over the time of everything. The *limit* is these products alone, on sorted rows in equal
groups, by the fastest of the plain ways that torch has; a share of 1 would be a layer whose router,
permutation, activation and combination cost nothing. The *fastest peer* is the one with the most
useful FLOP/s, dropless or not. *On* is a GPU, or the widest instructions for products that the CPU
has: bf16 ones of AMX or AVX-512, or those of fp32 alone. Medians of the ratios of each round
(least–most). In bold what falls short of the targets: {targets}. Where the time goes is told by the
profiles below."""
