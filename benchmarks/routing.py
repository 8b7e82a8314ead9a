"""What routing costs: planning and bookkeeping beside the whole layer, and the experts alone.

    python benchmarks/layer.py [--tokens 8192] [--experts 64] [--top-k 8] [--device cuda] ...

One layer, forward and backward, for every gate and drop policy, on one device. *Planning* is all
before any row moves: router logits, gate, drop policy, slots. *Bookkeeping* is the ledger, its
check and the losses. The *limit* is the experts' matrix products, forward and backward, on as many
rows in equal groups. All are measured in turn, repeatedly, in one run; the table shows medians of
ratios and their range. Writes layer.{json,md} into results/ (layer-cuda on a GPU).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import record
import torch
from torch import Tensor

from moetrain.moe import Draws, Gate, MoE, keyed
from moetrain.moe.ledger import is_conserved

CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("topk", {}),
    ("topk", {"drop_policy": "probability"}),
    ("topk", {"drop_policy": "random"}),
    ("topk", {"drop_policy": "spill"}),
    ("topk", {"capacity_factor": None}),
    ("noisy_topk", {}),
    ("sigmoid", {}),
    ("hierarchical", {}),
    ("hash", {}),
    ("random", {}),
    ("balanced", {}),
    ("switch", {}),
    ("gshard", {}),
    ("expert_choice", {}),
)
OWN_TOP_K = {"switch": 1, "gshard": 2}


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    rows, data = [], []
    for name, settings in CASES:
        case = Case(options, name, settings)
        times = measure(case.parts(), options.repeats, options.device)
        data.append({"gate": name, **settings, "top_k": case.moe.gate.top_k, "seconds": times})
        rows.append(row(name, settings, case.moe.gate.top_k, times))
        print(*rows[-1], sep="  ", flush=True)
    device = "-cuda" if options.device == "cuda" else ""
    record.write(f"layer{device}", {"options": vars(options), "cases": data}, report(options, rows))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What routing costs beside a layer's experts.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--group", type=int, default=1024, help="tokens of a routing group")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--expert-dim", type=int, default=512)
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    parser.add_argument("--dtype", default="bfloat16", help="of activations and experts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


class Case:
    """A layer, its input, and the parts of its work that are measured."""

    def __init__(self, options: argparse.Namespace, name: Any, settings: dict[str, Any]):
        top_k: int = OWN_TOP_K.get(name) or options.top_k
        groups = 8 if name == "hierarchical" else 1
        gate = Gate(name, top_k, groups=groups, top_groups=min(4, groups))
        factor = settings.get("capacity_factor", options.capacity_factor)
        policy = settings.get("drop_policy", "position")
        shape = (options.dim, options.expert_dim, options.experts)
        self.moe = MoE(
            0, *shape, gate, capacity_factor=factor, group=options.group, drop_policy=policy
        ).to(options.device)
        for parameter in self.moe.parameters():
            torch.nn.init.normal_(parameter, std=options.dim**-0.5)
        self.moe.experts.to(getattr(torch, options.dtype))
        x_TD = torch.randn(options.tokens, options.dim, device=options.device)
        self.x_BLD = x_TD.to(getattr(torch, options.dtype)).view(-1, options.group, options.dim)
        self.valid_BL = torch.ones_like(self.x_BLD[..., 0], dtype=torch.bool)
        self.token_BL = torch.randint(0, 50_000, self.valid_BL.shape, device=options.device)
        ids = torch.arange(options.tokens, device=options.device)
        self.draws = Draws(keyed.step_key(0, 1, options.device), ids)

    def parts(self) -> dict[str, Callable[[], object]]:
        arguments = (self.x_BLD, self.valid_BL, "train", self.draws, self.token_BL)
        routed = self.moe.route(*arguments)

        def planning() -> object:
            return self.moe.route(*arguments)

        def bookkeeping() -> object:
            return bool(is_conserved(self.moe.stats(routed).ledger))

        def layer() -> None:
            x_BLD = self.x_BLD.detach().requires_grad_()
            y_BLD, stats, *_ = self.moe(x_BLD, *arguments[1:])
            loss = y_BLD.float().sum() + stats.balance_sum + stats.z_sum
            loss.backward()
            self.moe.zero_grad()

        plan = routed.plan
        num_rows = int(plan.count_E.sum() if plan.rows_per_expert is None else len(plan.source_R))
        rows_ERD = self._rows(num_rows)

        def limit() -> None:
            self.moe.experts(rows_ERD, None).float().sum().backward()
            self.moe.zero_grad()

        return {"planning": planning, "bookkeeping": bookkeeping, "layer": layer, "limit": limit}

    def _rows(self, num_rows: int) -> Tensor:
        experts, dim = self.moe.num_experts, self.x_BLD.shape[-1]
        rows = torch.randn(experts, num_rows // experts, dim, device=self.x_BLD.device)
        return rows.to(self.x_BLD.dtype).requires_grad_()


def measure(
    parts: dict[str, Callable[[], object]], repeats: int, device: str
) -> dict[str, list[float]]:
    """Seconds of every part, all parts in turn; the first round warms up and is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in parts}
    for turn in range(repeats + 1):
        for name, part in parts.items():
            start = time.perf_counter()
            part()
            if device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def row(
    name: str, settings: dict[str, Any], top_k: int, times: dict[str, list[float]]
) -> list[str]:
    factor = settings.get("capacity_factor", "capacity")
    kind = "dropless" if factor is None else settings.get("drop_policy", "position")
    shares = [share(times[part], times["layer"], 100) for part in ("planning", "bookkeeping")]
    return [name, str(top_k), kind, *shares, share(times["limit"], times["layer"], 1)]


def share(part: list[float], whole: list[float], scale: int) -> str:
    """Median of the ratios of each round, and their range."""
    ratios = [scale * a / b for a, b in zip(part, whole, strict=True)]
    digits, unit = (1, " %") if scale == 100 else (2, "")
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    return f"{middle:.{digits}f}{unit} ({low:.{digits}f}–{high:.{digits}f})"


def report(options: argparse.Namespace, rows: list[list[str]]) -> str:
    header = [
        "gate",
        "K",
        "drop policy",
        "planning / layer",
        "bookkeeping / layer",
        "limit / layer",
    ]
    return f"""# What routing costs

{options.tokens} tokens in groups of {options.group}, {options.experts} experts, model width
{options.dim}, expert width {options.expert_dim}, capacity factor {options.capacity_factor},
{options.dtype} on {options.device}; forward and backward. Medians of {options.repeats} rounds
(least–most).

{record.table(header, rows)}

*Planning*: router logits, gate, drop policy, slots. *Bookkeeping*: the ledger, the check that it
adds up, and the losses, forward. *Limit*: the experts' matrix products alone, forward and backward,
on as many rows."""


if __name__ == "__main__":
    main()
