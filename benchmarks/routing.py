"""What routing costs: planning and bookkeeping beside the whole layer.

    python benchmarks/routing.py [--tokens 8192] [--experts 64] [--top-k 8] [--device cpu] ...

One layer, forward and backward, for every gate and drop policy, on one device. *Planning* is all
before any row moves: router logits, gate, drop policy, slots. *Bookkeeping* is the ledger, its
check and the losses. All are measured in turn, in processes of their own; the table shows medians
of ratios and their range. Writes routing.{json,md} into results/ (routing-cuda on a GPU).
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import harness
import record
import torch
from contenders.cell import DTYPES
from harness import Contender, Field, Sample, ratio

from moetrain.mesh import Mesh
from moetrain.moe import Draws, Gate, MoE, keyed
from moetrain.moe.ledger import is_conserved
from moetrain.parallel import connect_experts

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
PARTS = ("planning", "bookkeeping", "layer")
HIERARCHICAL_GROUPS, OPEN_GROUPS = 8, 4


def main() -> None:
    options = arguments()
    rows, data = [], []
    contenders = [Contender(part, partial(Part, options, part)) for part in PARTS]
    with Field(contenders, options.device) as field:
        for name, settings in CASES:
            field.build((name, settings))
            samples = field.measure(options.repeats)
            top_k = top_k_of(options, name)
            seconds = {part: sample.seconds for part, sample in samples.items()}
            data.append({"gate": name, **settings, "top_k": top_k, "seconds": seconds})
            rows.append(row(name, settings, top_k, samples))
            print(*rows[-1], sep="  ", flush=True)
    name, whole = (
        record.name_on(options.device, "routing"),
        {"options": vars(options), "cases": data},
    )
    record.write(name, whole, report(options, rows), device=options.device)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What routing costs beside a layer's experts.")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--group", type=int, default=1024, help="tokens of a routing group")
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=8)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--expert-dim", type=int, default=512)
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    parser.add_argument("--dtype", choices=DTYPES, help="of activations and experts")
    harness.add_device(parser)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    options.dtype = options.dtype or harness.usual_dtype(options.device)
    for name in ("tokens", "group", "dim", "expert_dim", "capacity_factor", "repeats", "top_k"):
        if getattr(options, name) <= 0:
            flag = name.replace("_", "-")
            parser.error(f"--{flag} ({getattr(options, name)}) must be above 0")
    if options.tokens % options.group:
        parser.error(f"--tokens ({options.tokens}) must be a multiple of --group ({options.group})")
    if options.experts % HIERARCHICAL_GROUPS or options.experts < HIERARCHICAL_GROUPS:
        parser.error(f"--experts ({options.experts}) must be a multiple of {HIERARCHICAL_GROUPS}")
    if options.top_k % OPEN_GROUPS or options.top_k > options.experts // 2:
        parser.error(
            f"--top-k ({options.top_k}) must be a multiple of {OPEN_GROUPS}, and at most half of "
            f"--experts ({options.experts}): hierarchical chooses in {OPEN_GROUPS} groups of "
            f"{HIERARCHICAL_GROUPS}"
        )
    return options


def top_k_of(options: argparse.Namespace, name: str) -> int:
    return OWN_TOP_K.get(name) or options.top_k


class Part:
    """See `harness.Case`: one of `PARTS` of a layer's work, on an input of its own."""

    def __init__(
        self, options: argparse.Namespace, part: str, case: tuple[Any, Any], device: torch.device
    ):
        name, settings = case
        torch.manual_seed(0)
        groups = HIERARCHICAL_GROUPS if name == "hierarchical" else 1
        top_k, top_groups = top_k_of(options, name), min(OPEN_GROUPS, groups)
        gate = Gate(name, top_k, groups=groups, top_groups=top_groups)
        factor = settings.get("capacity_factor", options.capacity_factor)
        policy = settings.get("drop_policy", "position")
        shape = (options.dim, options.expert_dim, options.experts)
        self.moe = MoE(
            0, *shape, gate, capacity_factor=factor, group=options.group, drop_policy=policy
        ).to(device)
        for parameter in self.moe.parameters():
            torch.nn.init.normal_(parameter, std=options.dim**-0.5)
        self.moe.experts.to(DTYPES[options.dtype])
        connect_experts(self.moe, Mesh(device))
        x_TD = torch.randn(options.tokens, options.dim, device=device)
        self.x_BLD = x_TD.to(DTYPES[options.dtype]).view(-1, options.group, options.dim)
        valid_BL = torch.ones_like(self.x_BLD[..., 0], dtype=torch.bool)
        token_BL = torch.randint(0, 50_000, valid_BL.shape, device=device)
        draws = Draws(keyed.step_key(0, 1, device), torch.arange(options.tokens, device=device))
        self.beside = (valid_BL, "train", draws, token_BL)
        self.routed = self.moe.route(self.x_BLD, *self.beside)
        self.step = getattr(self, part)

    def facts(self) -> None:
        """Nothing: the parts are measured, not compared."""

    def planning(self) -> None:
        self.moe.route(self.x_BLD, *self.beside)

    def bookkeeping(self) -> None:
        bool(is_conserved(self.moe.stats(self.routed).ledger))

    def layer(self) -> None:
        x_BLD = self.x_BLD.detach().requires_grad_()
        y_BLD, stats, *_ = self.moe(x_BLD, *self.beside)
        loss = y_BLD.float().sum() + stats.balance_sum + stats.z_sum
        loss.backward()
        self.moe.zero_grad()


def row(name: str, settings: dict[str, Any], top_k: int, samples: dict[str, Sample]) -> list[str]:
    factor = settings.get("capacity_factor", "capacity")
    kind = "dropless" if factor is None else settings.get("drop_policy", "position")
    shares = [
        ratio(samples[part].seconds, samples["layer"].seconds)
        for part in ("planning", "bookkeeping")
    ]
    return [name, str(top_k), kind, *(share.show(".1%") for share in shares)]


def report(options: argparse.Namespace, rows: list[list[str]]) -> str:
    header = ["gate", "K", "drop policy", "planning / layer", "bookkeeping / layer"]
    return f"""# What routing costs

{options.tokens} tokens in groups of {options.group}, {options.experts} experts, model width
{options.dim}, expert width {options.expert_dim}, capacity factor {options.capacity_factor},
{options.dtype} on {options.device}; forward and backward. Medians of {options.repeats} rounds
(least–most).

{record.table(header, rows)}

*Planning*: router logits, gate, drop policy, slots. *Bookkeeping*: the ledger, the check that it
adds up, and the losses, forward."""


if __name__ == "__main__":
    main()
