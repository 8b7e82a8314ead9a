"""What `benchmarks/layer.py` measured, in Markdown."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import operators
import record
from harness import Spread, ratio, spread

from contenders.cell import Cell, Shape

ValueOf = Callable[[dict[str, Any], str], Spread | None]
"""Of a cell's entry, for one of moetrain's layers."""
LIMIT, OWN, DROPLESS, LARGE = "limit", "moetrain", "moetrain dropless", "large product"
NO_PEERS = (LIMIT, "limit, given memory", LARGE, OWN, DROPLESS)
LEAST_SHARE, LEAST_SHARE_FEW, FEW_TOKENS = 0.90, 0.85, 2048
"""Targets on CPUs: of the limit, where there are more tokens than a few and where there are not."""
LEAST_SPEED, LEAST_SPEED_DEEPSPEED, MANY_TOKENS = 1.25, 2.0, 32_768
"""Times the fastest peer; times DeepSpeed where there are many tokens."""
MOST_MEMORY = 1.0
"""Times the leanest peer's."""
LEAST_OF_LARGE, LEAST_OF_LARGE_FINE, MANY_EXPERTS = 0.60, 0.40, 64
"""Targets on GPUs: of a large product's FLOP/s, of a few experts and of many; and ahead of all."""


def report(cells: list[dict[str, Any]]) -> str:
    """Summaries, and a table for every cell; those of one machine and dtype stand together."""
    cells = sorted(cells, key=_order)
    parts = [*_about(cells), *_ranges(cells), *_summary(cells), *_all(cells)]
    return "\n".join(["# One MoE layer, forward and backward", "", *parts])


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


def _about(cells: list[dict[str, Any]]) -> list[str]:
    """What is compared, and the targets."""
    few, others = f"{LEAST_SHARE_FEW} (of {FEW_TOKENS:,} tokens)", f"{LEAST_SHARE} (of more)"
    targets = (
        f"at least {few} or {others} of the limit, {LEAST_SPEED} times the fastest peer and, of "
        f"{MANY_TOKENS:,} tokens, {LEAST_SPEED_DEEPSPEED:g} times DeepSpeed; no more memory than "
        "the leanest peer. They were set for bf16 on AMX, shares of the limit for 8 experts, and "
        "are marked everywhere"
    )
    if _is_on_gpu(cells[0]):
        targets = (
            f"at least {LEAST_OF_LARGE} of the FLOP/s of a large product (of {MANY_EXPERTS} "
            f"experts {LEAST_OF_LARGE_FINE}), and no slower than the fastest peer"
        )
    return [ABOUT.format(targets=targets), ""]


def _summary(cells: list[dict[str, Any]]) -> list[str]:
    """A line for every cell."""
    header = [
        "layer", "EP", "tokens", "routing", "dtype", "on", f"moetrain: {_share_of(cells)}",
        "dropless", "fastest peer", "moetrain ÷ it", "dropless ÷ it", "leanest peer",
        "memory of moetrain ÷ it", "dropless ÷ it",
    ]  # fmt: skip
    rows = [
        [*_place(_cell(entry)), _device(entry), *_standing(_cell(entry), entry)] for entry in cells
    ]
    return [record.table(header, rows), ""]


def _share_of(cells: list[dict[str, Any]]) -> str:
    return f"share of {'a large product' if _is_on_gpu(cells[0]) else 'the limit'}"


def _ranges(cells: list[dict[str, Any]]) -> list[str]:
    """From the least median to the most, of cells that differ in tokens and routing alone."""
    header = ["layer", "EP", "tokens", "dtype", "on", f"moetrain: {_share_of(cells)}"]
    rows = []
    for (device, dtype, shape, ranks), alike in itertools.groupby(cells, key=_order_of_alike):
        entries = list(alike)
        tokens = sorted({_cell(entry).tokens for entry in entries})
        place = [shape, ranks, ", ".join(f"{number:,}" for number in tokens), dtype, device]
        rows.append([*place, *(_range(entries, of) for of in (_share, _speed, _memory))])
    header += ["÷ the fastest peer", "memory ÷ the leanest peer"]
    about = "From the least median to the most, and in brackets of the dropless layer:"
    return [about, "", record.table(header, rows), "", "Cell by cell:", ""]


def _range(cells: list[dict[str, Any]], value_of: ValueOf) -> str:
    found = []
    for name in (OWN, DROPLESS):
        values = [value_of(entry, name) for entry in cells if _is_right(entry, name)]
        medians = [value.median for value in values if value is not None]
        found.append(f"{min(medians):.2f}–{max(medians):.2f}" if medians else "–")
    return f"{found[0]} ({found[1]})"


def _order_of_alike(entry: dict[str, Any]) -> tuple[Any, ...]:
    cell = _cell(entry)
    return _device(entry), cell.dtype, cell.shape, cell.ranks


def _order(entry: dict[str, Any]) -> tuple[Any, ...]:
    shape, ranks, tokens, routing, dtype = _place(_cell(entry))
    return _device(entry), dtype, shape.experts, shape, ranks, tokens, routing


def _device(entry: dict[str, Any]) -> str:
    return entry.get("gpu", entry["instructions"])


def _is_on_gpu(entry: dict[str, Any]) -> bool:
    return "gpu" in entry


def _place(cell: Cell) -> list[Any]:
    return [cell.shape, cell.ranks, cell.tokens, cell.routing, cell.dtype]


class _Targets(NamedTuple):
    """What a cell is held to."""

    over: str
    """Whose useful FLOP/s a share is taken of."""
    share: float
    speed: float
    memory: float


def _targets(cell: Cell, entry: dict[str, Any]) -> _Targets:
    if _is_on_gpu(entry):
        is_fine = cell.shape.experts >= MANY_EXPERTS
        return _Targets(LARGE, LEAST_OF_LARGE_FINE if is_fine else LEAST_OF_LARGE, 1.0, math.inf)
    share = LEAST_SHARE if cell.tokens > FEW_TOKENS else LEAST_SHARE_FEW
    return _Targets(LIMIT, share, LEAST_SPEED, MOST_MEMORY)


def _standing(cell: Cell, entry: dict[str, Any]) -> list[str]:
    targets = _targets(cell, entry)

    def both(value_of: ValueOf, show: Callable[[Spread], str]) -> list[str]:
        values = [value_of(entry, n) if _is_right(entry, n) else None for n in (OWN, DROPLESS)]
        return ["–" if value is None else show(value) for value in values]

    def at_most(found: Spread) -> str:
        times = round(found.median, 2)
        return record.marked(f"{times:.2f}", is_short=times > targets.memory)

    return [
        *both(_share, partial(_at_least, targets.share)),
        fastest_peer(entry["systems"]) or "–",
        *both(_speed, partial(_at_least, targets.speed)),
        leanest_peer(entry["systems"]) or "–",
        *both(_memory, at_most),
    ]


def _share(entry: dict[str, Any], name: str) -> Spread:
    """Of the useful FLOP/s that targets are about."""
    return useful_rate(entry["systems"], name, _targets(_cell(entry), entry).over)


def _speed(entry: dict[str, Any], name: str) -> Spread | None:
    """Over the fastest peer's, if there is one."""
    fastest = fastest_peer(entry["systems"])
    return useful_rate(entry["systems"], name, fastest) if fastest else None


def _memory(entry: dict[str, Any], name: str) -> Spread | None:
    """Over the leanest peer's, if there is one."""
    systems, leanest = entry["systems"], leanest_peer(entry["systems"])
    if leanest is None:
        return None
    return spread([systems[name]["peak_bytes"] / max(1, systems[leanest]["peak_bytes"])])


def _is_right(entry: dict[str, Any], name: str) -> bool:
    return name in entry["systems"] and not entry["systems"][name]["wrong"]


def _at_least(wanted: float, found: Spread) -> str:
    return record.marked(found.show(), is_short=round(found.median, 2) < wanted)


def _all(cells: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in cells:
        cell = _cell(entry)
        lines += [f"## {cell}", "", _table(cell, entry), "", _where(entry), ""]
        for name, found in entry.get("profiles", {}).items():
            lines += [f"Where {name} spends its time:", "", operators.table(found), ""]
        missing = {n: e["absent"] for n, e in entry["systems"].items() if "absent" in e}
        wrong = {n: e["wrong"] for n, e in entry["systems"].items() if e.get("wrong")}
        for name, reason in {**missing, **wrong}.items():
            lines += [f"- {name}: {reason}."]
        lines += [""] if missing or wrong else []
    return lines


def _where(entry: dict[str, Any]) -> str:
    """Cells may have been measured at different times and places, and in as many rounds as their
    time allowed."""
    rounds = len(entry["systems"][LIMIT]["seconds"])
    cpu = f"{entry['cores']} cores of {entry['processor']} ({entry['instructions']})"
    command = [f"`{entry['command']}`"] if "command" in entry else []
    place = [f"{rounds} rounds", entry["date"], f"commit {entry['commit']}", entry.get("gpu", cpu)]
    return f"{', '.join([*command, *place, *entry.get('versions', [])])}."


def _table(cell: Cell, entry: dict[str, Any]) -> str:
    """Of a GPU with absolute times and rates."""
    systems, on_gpu = entry["systems"], _is_on_gpu(entry)
    header = ["system", *(["ms", "TFLOP/s"] if on_gpu else []), "share of the limit"]
    header += ["speed ÷ moetrain's", "FLOPs executed ÷ useful", "MiB a step takes", "dropped"]
    rows = []
    for name, found in systems.items():
        if "absent" in found:
            continue
        second = statistics.median(found["seconds"])
        absolute = [f"{1e3 * second:.2f}", f"{found['flops'] / second / 1e12:.0f}"]
        dropped = 1 - found["kept"] / found["assigned"]
        share, speed = (useful_rate(systems, name, over) for over in (LIMIT, OWN))
        is_near = name == "DeepSpeed" and round(speed.median, 2) > 1 / LEAST_SPEED_DEEPSPEED
        is_short = is_near and cell.tokens >= MANY_TOKENS and not on_gpu
        compared = [share.show(), record.marked(speed.show(), is_short)]
        rows.append(
            [
                f"{name} ({found['remark']})" if found["remark"] else name,
                *(absolute if on_gpu else []),
                *(["not ranked"] * 2 if found["wrong"] else compared),
                f"{found['executed'] / found['flops']:.2f}" if "executed" in found else "–",
                f"{found['peak_bytes'] / 2**20:.0f}",
                f"{dropped:.1%}",
            ]
        )
    return record.table(header, rows)


ABOUT = """\
Useful FLOP/s: those of the experts' three matrix products and their gradients on rows that are not
dropped, over the time of everything. Executed ones are those of all matrix products, of the router
and of empty rows, too. The *limit* is the experts' products alone, on sorted rows in equal groups,
by the fastest of the plain ways that torch has; a share of 1 would be a layer whose router,
permutation, activation and combination cost nothing. The *fastest peer* is the one with the most
useful FLOP/s, dropless or not. *On* is a GPU, or the widest instructions for products that the CPU
has: bf16 ones of AMX or AVX-512, or those of fp32 alone. Medians of the ratios of each round
(least–most). In bold what falls short of the targets: {targets}. Where the time goes is told by the
profiles below."""
