"""How the cost of an MoE layer grows: with tokens, experts, choices and ranks.

    python benchmarks/scaling.py [--curves tokens experts finer choices ranks] [--dtype fp32]
        [--device cpu]

Forward and backward of the layer as training uses it: router, plan, rows to the experts and back,
their sum, losses, ledger and its check; capacity factor 1.25 in every sequence, bf16 where the
machine has instructions for it. Beside every point stand its experts' matrix products alone. All of
a curve take turns in every round, and to every round an exponent is fitted: cost ∝ size^p. A cost
counts what found a slot alone: what is dropped is not computed, and makes no curve flat. Tokens
of the ranks curve are divided among the ranks; on a CPU they share its cores, so what it shows is
what their transport and waiting adds. `--profile` adds where the ends of a curve that misses its
target spend their time. Writes scaling.{json,md,png} into results/ (scaling-cuda on
GPUs).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import fits
import harness
import operators
import record
import torch
import torch.distributed as dist
from contenders.cell import DTYPES, Cell, Shape
from contenders.limit import Limit
from harness import AbsentError, Case, Contender, Field
from stepping.own import mesh_of
from torch import nn

from moetrain.moe import Gate, MoE
from moetrain.moe.ledger import is_conserved
from moetrain.parallel import connect_experts

SEQUENCE = 512
BALANCE_COEF, Z_COEF = 0.01, 0.001


class Point(NamedTuple):
    """A layer, and how many tokens pass it."""

    tokens: int = 8192
    """Of all ranks."""
    experts: int = 8
    top_k: int = 2
    dim: int = 512
    expert_dim: int = 1024
    ranks: int = 1
    dtype: str = "bf16"
    """Of tokens and experts."""

    @property
    def cell(self) -> Cell:
        """What its matrix products are made of."""
        shape = Shape(self.dim, self.expert_dim, self.experts, self.top_k)
        return Cell(shape, self.tokens, "balanced", self.dtype, self.ranks)


class Curve(NamedTuple):
    """What grows, and what was promised."""

    what: str
    field: str
    """The field of a point that grows."""
    points: list[Point]
    ideal: float
    """The exponent of a layer in which nothing but matrix products takes time."""
    target: str = ""
    most_exponent: float = math.inf
    most_growth: float = math.inf
    """From the first point to the last, as a ratio."""

    def is_met(self, exponent: float, growth: float) -> bool | None:
        """Whether the promise is kept, where there is one."""
        if not self.target:
            return None
        return exponent <= self.most_exponent and growth <= self.most_growth


def curves(device: harness.Device, dtype: str) -> dict[str, Curve]:
    """All of them. A GPU gets layers that keep it busy."""
    large = {} if device == "cpu" else {"tokens": 32_768, "dim": 2048, "expert_dim": 2048}
    base = Point(**large, dtype=dtype)
    tokens = [base._replace(tokens=base.tokens * 2**n // 8) for n in range(5)]
    experts = [base._replace(experts=n) for n in (8, 16, 32, 64)]
    finer = [
        base._replace(experts=8 * n, top_k=base.top_k * n, expert_dim=base.expert_dim // n)
        for n in (1, 2, 4, 8)
    ]
    choices = [base._replace(top_k=n) for n in (1, 2, 4, 8)]
    ranks = [base._replace(ranks=n) for n in (1, 2, 4, 8) if n <= most_ranks(device)]
    linear, flat = "exponent at most 1.05", "at most +10 %"
    shared = 0.0 if device == "cpu" else -1.0
    return {
        "tokens": Curve("tokens", "tokens", tokens, 1.0, linear, most_exponent=1.05),
        "experts": Curve("experts", "experts", experts, 0.0, flat, most_growth=1.10),
        "finer": Curve("finer experts", "experts", finer, 0.0, flat, most_growth=1.10),
        "choices": Curve("choices", "top_k", choices, 1.0),
        "ranks": Curve("ranks", "ranks", ranks, shared),
    }


NAMES = ("tokens", "experts", "finer", "choices", "ranks")


def most_ranks(device: harness.Device) -> int:
    """On a CPU four, whatever its cores; GPUs are for one rank each."""
    return 4 if device == "cpu" else torch.cuda.device_count()


class LayerStep:
    """Forward and backward of one layer on this rank's tokens."""

    def __init__(self, point: Point, device: torch.device):
        self.point, self.moe = point, layer(point, device)
        generator = torch.Generator().manual_seed(1 + dist.get_rank())
        shape = (point.tokens // point.ranks // SEQUENCE, SEQUENCE, point.dim)
        self.x_BLD = torch.randn(shape, generator=generator).to(device, DTYPES[point.dtype])
        self.valid_BL = torch.ones(shape[:2], dtype=torch.bool, device=device)
        self.counts = point.tokens // SEQUENCE, point.tokens

    def step(self) -> None:
        """Once, with the check of the ledger that training makes."""
        x_BLD = self.x_BLD.detach().requires_grad_()
        y_BLD, stats, *_ = self.moe(x_BLD, self.valid_BL, "train")
        groups, tokens = self.counts
        balance, z = BALANCE_COEF * stats.balance_sum / groups, Z_COEF * stats.z_sum / tokens
        torch.autograd.backward([y_BLD, balance + z], [self.x_BLD, None])
        assert is_conserved(stats.ledger)
        self.moe.zero_grad()

    def facts(self) -> dict[str, int]:
        """Assignments of this rank, and those that found a slot."""
        ledger = self.moe(self.x_BLD, self.valid_BL, "train").stats.ledger
        return {"assigned": int(ledger.assigned), "kept": int(ledger.row_E.sum())}


def layer(point: Point, device: torch.device) -> MoE:
    """The layer with this rank's experts, connected as a run connects it."""
    gate = Gate("topk", point.top_k)
    moe = MoE(0, point.dim, point.expert_dim, point.experts, gate, capacity_factor=1.25)
    held = point.experts // point.ranks
    for name, weight in list(moe.experts.named_parameters()):
        mine = torch.empty(held, *weight.shape[1:], dtype=DTYPES[point.dtype])
        moe.experts.register_parameter(name, nn.Parameter(mine))
    generator = torch.Generator().manual_seed(0)
    for weight in moe.parameters():
        nn.init.normal_(weight, std=point.dim**-0.5, generator=generator)
    mesh = mesh_of(device, point.ranks)
    connect_experts(moe, mesh)
    return moe.to(device)


def limit(point: Point, device: torch.device) -> Limit:
    """The matrix products of the layer, on the rows that its tokens ask for in equal groups."""
    return Limit(point.cell, device)


def build(
    place: int,
    make: Callable[[Point, torch.device], Case],
    points: list[Point],
    device: torch.device,
) -> Case:
    """What is made of the point of a curve at a place, for the harness."""
    if place >= len(points):
        raise AbsentError("this curve has fewer points")
    return make(points[place], device)


def contenders(ranks: list[int]) -> list[Contender]:
    """At so many places of a curve, a layer and its products."""
    return [
        Contender(f"{make.__name__} {place}", partial(build, place, make), of_one)
        for make in (LayerStep, limit)
        for place, of_one in enumerate(ranks)
    ]


def main() -> None:
    options = arguments()
    every = curves(options.device, options.dtype)
    chosen = [every[name] for name in options.curves]
    found = []
    for ranks, together in teams(chosen):
        with Field(contenders(ranks), options.device) as field:
            found += [measure(field, curve, options.rounds) for curve in together]
    if options.profile:
        for curve, entry in zip([c for _, of in teams(chosen) for c in of], found, strict=True):
            if entry["is_met"] is False:
                print(f"{curve.what}: profiling", flush=True)
                entry["profiles"] = profiles(curve, options.device)
    name = record.name_on(options.device, "scaling")
    draw(found, name)
    data, page = {"options": vars(options), "curves": found}, report(found, name, options)
    print(record.write(name, data, page, device=options.device))


def teams(chosen: list[Curve]) -> Iterator[tuple[list[int], list[Curve]]]:
    """Curves whose points can be built by the same processes, and the ranks of each place."""
    alone = [curve for curve in chosen if curve.field != "ranks"]
    if alone:
        yield [1] * max(len(curve.points) for curve in alone), alone
    for curve in chosen:
        if curve.field == "ranks":
            yield [point.ranks for point in curve.points], [curve]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="How the cost of an MoE layer grows.")
    harness.add_device(parser)
    parser.add_argument("--curves", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--dtype", choices=DTYPES, help="of tokens and experts")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every point")
    parser.add_argument("--profile", action="store_true", help="say what a missed target is due to")
    options = parser.parse_args()
    options.dtype = options.dtype or harness.usual_dtype(options.device)
    harness.require_at_least(parser, options, rounds=2)  # to tell a range
    if most_ranks(options.device) < 2 and "ranks" in options.curves:
        options.curves = [name for name in options.curves if name != "ranks"]
        if not options.curves:
            parser.error("--curves ranks needs two GPUs, and one is here; try --device cpu")
        print("ranks: left out, since there is one GPU", flush=True)
    return options


def measure(field: Field, curve: Curve, rounds: int) -> dict[str, Any]:
    """All points of a curve in turn."""
    print(f"{curve.what}: building", flush=True)
    built = list(field.build(curve.points).values())
    facts = [ranks for ranks in built if not isinstance(ranks, AbsentError)]
    print(f"{curve.what}: measuring", flush=True)
    measured = list(field.measure(rounds).values())
    sizes = [getattr(point, curve.field) for point in curve.points]
    samples, limits = measured[: len(sizes)], measured[len(sizes) :]
    shares = [kept(ranks) for ranks in facts[: len(sizes)]]
    seconds = [
        [second / share for second in sample.seconds]
        for sample, share in zip(samples, shares, strict=True)
    ]
    of_limits = [sample.seconds for sample in limits]
    fitted = fits.exponent(sizes, list(zip(*seconds, strict=True)))
    growth = harness.ratio(seconds[-1], seconds[0])
    print(f"{curve.what}: exponent {fitted.show()}", flush=True)
    return {
        "what": curve.what,
        "points": [point._asdict() for point in curve.points],
        "sizes": sizes,
        "seconds": seconds,
        "limit_seconds": of_limits,
        "peak_bytes": [sample.peak_bytes for sample in samples],
        "kept": shares,
        "exponent": fitted,
        "growth": growth,
        "limit_growth": harness.ratio(of_limits[-1], of_limits[0]),
        "ideal": curve.ideal,
        "target": curve.target,
        "is_met": curve.is_met(fitted.value, growth.median),
    }


def kept(ranks: list[dict[str, int]]) -> float:
    """Share of all ranks' assignments that found a slot."""
    return sum(rank["kept"] for rank in ranks) / sum(rank["assigned"] for rank in ranks)


def profiles(curve: Curve, device: harness.Device) -> list[list[dict[str, Any]]]:
    """The operators of the first point and of the last."""
    ends = [
        Contender(str(place), partial(operators.Profiled, partial(build, place, LayerStep)))
        for place in (0, len(curve.points) - 1)
    ]
    with Field(ends, device) as field:
        answers = field.build(curve.points).values()
    return [ranks[0] for ranks in answers if not isinstance(ranks, AbsentError)]


# ---- report --------------------------------------------------------------------------------------


def report(found: list[dict[str, Any]], name: str, options: argparse.Namespace) -> str:
    rows = [
        [
            curve["what"],
            f"{curve['sizes'][0]} to {curve['sizes'][-1]}",
            curve["exponent"].show(),
            curve["growth"].show(),
            curve["limit_growth"].show(),
            curve["target"],
            {True: "yes", False: "**no**", None: ""}[curve["is_met"]],
        ]
        for curve in found
    ]
    header = ["", "range", "exponent", "last / first", "products alone", "target", "met"]
    return "\n\n".join(
        [
            "# How the cost of a layer grows",
            f"Forward and backward of one MoE layer, {options.dtype}, capacity factor 1.25; "
            f"{options.rounds} rounds in which all points of a curve have a turn. The exponent p "
            "of cost ∝ size^p is the mean of those fitted to each round, with its range of 95 % "
            "confidence. A cost is seconds by the share of assignments that found a slot, since "
            "what is dropped is not computed. *Last / first* is the median ratio of costs "
            "(least–most), and *products alone* the same of the experts' matrix products without "
            "the rest of the layer, by the fastest of the plain ways that torch has.",
            record.table(header, rows),
            "*Experts* are all of the same width; *finer experts* are narrower the more there are, "
            "and a token chooses more of them: both compute as much at every point. *Ranks* divide "
            "the same tokens and experts. On a CPU they divide its cores, too: at best the cost "
            "stays as it is, and what grows is transport and waiting; ranks beyond the cores take "
            "turns on them. With a device for every rank the best exponent is -1. *Memory* is the "
            "most that a step takes beyond what is there before, of all ranks; *kept* are the "
            "assignments that found a slot; *share* is what the products alone take of the cost.",
            f"![Cost by size]({name}.png)",
            *(details(curve) for curve in found),
        ]
    )


def details(curve: dict[str, Any]) -> str:
    """The points of a curve."""
    first = curve["seconds"][0]
    keys = "points", "seconds", "limit_seconds", "peak_bytes", "kept"
    rows = [
        [
            *(point[field] for field in ("tokens", "experts", "top_k", "expert_dim", "ranks")),
            harness.ratio(seconds, first).show(),
            harness.ratio(of_limit, seconds).show(),
            f"{peak / 2**20:,.0f} MiB",
            f"{share:.1%}",
        ]
        for point, seconds, of_limit, peak, share in zip(*(curve[key] for key in keys), strict=True)
    ]
    header = ["tokens", "experts", "K", "expert width", "ranks", "cost", "share", "memory", "kept"]
    parts = [f"## {curve['what'].capitalize()}", record.table(header, rows)]
    ends = curve["sizes"][0], curve["sizes"][-1]
    for size, found in zip(ends, curve.get("profiles", ()), strict=False):
        parts += [f"Where {size} {curve['what']} spend their time:", operators.table(found)]
    return "\n\n".join(parts)


def draw(found: list[dict[str, Any]], name: str) -> None:
    plt = record.pyplot()
    figure, every = plt.subplots(1, len(found), figsize=(3.2 * len(found), 3.3), squeeze=False)
    for axes, curve in zip(every[0], found, strict=True):
        sizes, first = curve["sizes"], curve["seconds"][0]
        costs = [harness.ratio(seconds, first) for seconds in curve["seconds"]]
        medians, least, most = zip(*costs, strict=True)
        axes.fill_between(sizes, least, most, color="#0072b2", alpha=0.2, linewidth=0)
        axes.plot(sizes, medians, "o-", color="#0072b2", markersize=4)
        shape = [(size / sizes[0]) ** curve["ideal"] for size in sizes]
        axes.plot(sizes, shape, ":", color="#555555", label=f"exponent {curve['ideal']:g}")
        axes.set(xscale="log", yscale="log", xlabel=curve["what"])
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
        axes.minorticks_off()
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.5), max(high, 2.0))
        axes.set_yticks(ticks := nice(axes.get_ylim()), [f"{tick:g}" for tick in ticks])
        axes.set_title(f"exponent {curve['exponent'].show()}", fontsize=9)
        axes.legend(fontsize=8)
    every[0][0].set_ylabel("cost over the first point's")
    figure.tight_layout()
    figure.savefig(record.RESULTS / f"{name}.png")


def nice(limits: tuple[float, float]) -> list[float]:
    """Powers of two in between."""
    return [2.0**n for n in range(-6, 12) if limits[0] <= 2.0**n <= limits[1]]


if __name__ == "__main__":
    main()
