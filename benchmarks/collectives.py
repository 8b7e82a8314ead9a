"""How fast rows travel between ranks: collectives against message size.

    python benchmarks/collectives.py [--ranks 2] [--device cpu] [--rounds 9]
    torchrun --nnodes 2 --nproc-per-node 8 ... benchmarks/collectives.py

Gloo between processes of a CPU, NCCL between GPUs. Without a launcher it starts its own ranks;
under torchrun it uses those that are there, on however many nodes. All kinds take turns in every
round: all-to-all with equal and unequal parts, moetrain's own (`moetrain.moe.flights`), all-gather
and reduce-scatter. A message is what one rank sends, to itself too (of an all-gather, what all
ranks have together). Bandwidth is bytes that leave a rank, by the seconds of the slowest rank: on a
CPU told beside that of a plain copy, in GB/s of GPUs alone. A line, seconds = latency + bytes /
bandwidth, is fitted to each kind. Writes collectives.{json,md,png} into results/ (collectives-cuda
on GPUs).
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import fits
import harness
import record
import torch
import torch.distributed as dist
from torch import Tensor

from moetrain import settings
from moetrain.errors import UserError
from moetrain.mesh import process_group
from moetrain.moe import flights

ROW = 64
"""bf16 numbers in a row, of which messages are made: 128 bytes."""
KINDS = (
    "all-to-all, even",
    "all-to-all, uneven",
    "all-to-all of moetrain",
    "all-gather",
    "reduce-scatter",
)
COPY = "copy"
COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#009e73", "#777777")


def main() -> None:
    options = arguments()
    if "WORLD_SIZE" not in os.environ:
        raise SystemExit(start_ranks(options))
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks for them
    try:
        with process_group() as device:
            found = measure(options, device)
            if dist.get_rank() == 0:
                write(options, found)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Bandwidth of collectives by message size.")
    harness.add_device(parser)
    parser.set_defaults(device=None)
    parser.add_argument(
        "--ranks",
        type=int,
        help="to start, where no launcher did: usually one for each GPU, or two on CPUs",
    )
    parser.add_argument("--least", type=int, default=2**10, help="bytes of the smallest message")
    parser.add_argument("--most", type=int, default=2**26, help="bytes of the largest")
    parser.add_argument("--rounds", type=int, default=9, help="turns of every kind and size")
    options = parser.parse_args()
    gpus, is_started = torch.cuda.device_count(), "WORLD_SIZE" in os.environ
    if options.device is None:
        options.device = "cuda" if gpus > 1 or (is_started and gpus) else "cpu"
        if gpus and options.device == "cpu":
            print("One GPU is here, and rows travel between GPUs: measuring ranks on CPUs.")
    if options.device == "cuda" and gpus < 2 and not is_started:
        parser.error("rows travel between GPUs, and one is here; try --device cpu")
    if is_started:
        options.ranks = int(os.environ["WORLD_SIZE"])
    elif options.ranks is None:
        options.ranks = gpus if options.device == "cuda" else 2
    if options.ranks < 2:
        parser.error(f"--ranks ({options.ranks}) must be at least 2: rows travel between ranks")
    if options.device == "cuda" and not is_started and options.ranks > gpus:
        parser.error(f"--ranks ({options.ranks}) needs as many GPUs, and there are {gpus}")
    if not 2 * ROW <= options.least <= options.most:
        parser.error(
            f"--least ({options.least}) must be at least {2 * ROW} and at most --most "
            f"({options.most})"
        )
    harness.require_at_least(parser, options, rounds=1)
    return options


def start_ranks(options: argparse.Namespace) -> int:
    """This program once more, by torchrun, on this machine and the device that was chosen."""
    torchrun = [sys.executable, "-m", "moetrain.torchrun", f"--nproc-per-node={options.ranks}"]
    command = [*torchrun, *sys.argv, "--device", options.device]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # torchrun would choose that aloud
    return subprocess.run(command, env=environment).returncode


# ---- on every rank -------------------------------------------------------------------------------


class Size(NamedTuple):
    """All kinds at one size of message, as this rank saw them."""

    message: int
    """Bytes."""
    sent: float
    """Those of them that leave a rank, on average."""
    seconds: dict[str, list[float]]
    """By kind, round by round: of the slowest rank."""


def measure(options: argparse.Namespace, device: torch.device) -> list[Size]:
    """Every kind at every size, in turn; a collective."""
    ranks, found = dist.get_world_size(), []
    for message in sizes(options.least, options.most):
        rows = rows_of(message, ranks)
        works = {COPY: copy(rows, device), **collectives(rows, device)}
        times = {kind: pace(work, device) for kind, work in works.items()}
        seconds: dict[str, list[float]] = {kind: [] for kind in works}
        for number in range(options.rounds):
            for kind in harness.turns(list(works), number):
                seconds[kind].append(turn(works[kind], times[kind], device))
        num_bytes = rows * 2 * ROW
        found.append(Size(num_bytes, leaving(num_bytes, ranks), seconds))
        if dist.get_rank() == 0:
            medians = {kind: harness.spread(of_kind).median for kind, of_kind in seconds.items()}
            told = ", ".join(f"{kind} {s / medians[COPY]:.3g}" for kind, s in medians.items())
            print(f"{show_bytes(num_bytes)}, times of a copy: {told}", flush=True)
    return found


def sizes(least: int, most: int) -> list[int]:
    """From the one to the other, each four times the one before; the largest is there."""
    found = [most]
    while found[-1] // 4 >= least:
        found.append(found[-1] // 4)
    return found[::-1]


def rows_of(message: int, ranks: int) -> int:
    """Rows of a message, as many for every rank: up to a row for each more than asked for."""
    return -(-message // (2 * ROW * ranks)) * ranks


def leaving(num_bytes: int, ranks: int) -> float:
    """Bytes of a message that leave a rank, on average over ranks; alike for all kinds."""
    return num_bytes * (ranks - 1) / ranks


def uneven_parts(rows: int, ranks: int) -> list[int]:
    """Rows for each rank: the first has the most, the n-th an n-th of that (Zipf)."""
    weights = [1 / (rank + 1) for rank in range(ranks)]
    parts = [int(rows * weight / sum(weights)) for weight in weights]
    parts[0] += rows - sum(parts)
    return parts


def copy(rows: int, device: torch.device) -> Callable[[], object]:
    """A message that goes nowhere."""
    source, target = message_of(rows, device), message_of(rows, device)
    return lambda: target.copy_(source)


def collectives(rows: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """Each kind with its message and where it goes."""
    ranks, rank = dist.get_world_size(), dist.get_rank()
    group = dist.group.WORLD
    assert group is not None
    # torch 2.13 renames what 2.11 knows by these names alone.
    warnings.filterwarnings("ignore", "`torch.distributed.*deprecated", FutureWarning)
    whole, part = message_of(rows, device), message_of(rows // ranks, device)
    target = torch.empty_like(whole)
    parts, even = uneven_parts(rows, ranks), [rows // ranks] * ranks
    mine = whole.new_empty(ranks * parts[rank], ROW)
    learned = whole.clone().requires_grad_()

    def fly() -> Tensor:
        return flights.land(flights.all_to_all(learned, group.group_name, even, even))

    works = (
        lambda: dist.all_to_all_single(target, whole),
        lambda: dist.all_to_all_single(mine, whole, [parts[rank]] * ranks, parts),
        fly,
        lambda: dist.all_gather_into_tensor(target, part),
        lambda: dist.reduce_scatter_tensor(part, whole),
    )
    return dict(zip(KINDS, works, strict=True))


def message_of(rows: int, device: torch.device) -> Tensor:
    return torch.ones(rows, ROW, dtype=torch.bfloat16, device=device)


def pace(work: Callable[[], object], device: torch.device) -> int:
    """How often a turn repeats it, for 20 ms at least, on all ranks alike; warms it up."""
    turn(work, 3, device)
    return max(3, round(0.02 / turn(work, 3, device)))


def turn(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one of `times` repetitions, on the slowest rank; a collective."""
    work()
    dist.barrier()
    harness.synchronize(device.type)
    started = time.perf_counter()
    for _ in range(times):
        work()
    harness.synchronize(device.type)
    seconds = torch.tensor((time.perf_counter() - started) / times, dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)  # between CPUs, also of NCCL's ranks
    return seconds.item()


# ---- report --------------------------------------------------------------------------------------


def write(options: argparse.Namespace, found: list[Size]) -> None:
    on_gpu = options.device == "cuda"
    name = record.name_on(options.device, "collectives")
    ranks, nodes = dist.get_world_size(), node_count()
    lines = {kind: line(found, kind) for kind in KINDS}
    data = {
        "options": vars(options),
        "ranks": ranks,
        "nodes": nodes,
        "sizes": [size._asdict() for size in found],
        "lines": {kind: of_kind._asdict() for kind, of_kind in lines.items()},
    }
    draw(found, lines, name, on_gpu)
    page = report(found, lines, name, ranks, nodes)
    print(record.write(name, data, page, device=options.device))


def node_count() -> int:
    """Nodes that the launcher spread the ranks over."""
    ranks = dist.get_world_size()
    return ranks // (settings.ranks_of_node() or ranks)


def line(found: list[Size], kind: str) -> fits.Transport:
    """Through the medians of a kind."""
    times = [harness.spread(size.seconds[kind]).median for size in found]
    return fits.transport([size.sent for size in found], times)


def unit(found: list[Size], on_gpu: bool) -> float:
    """What bandwidths are told in, in bytes per second: GB/s, or a copy of the largest message."""
    return 1e9 if on_gpu else found[-1].message / harness.spread(found[-1].seconds[COPY]).median


def bandwidth(size: Size, kind: str, scale: float) -> harness.Spread:
    num_bytes = size.message if kind == COPY else size.sent
    return harness.spread([num_bytes / s / scale for s in size.seconds[kind]])


def report(
    found: list[Size], lines: dict[str, fits.Transport], name: str, ranks: int, nodes: int
) -> str:
    on_gpu = name.endswith("-cuda")
    scale, every = unit(found, on_gpu), (*KINDS, COPY)
    what = "GB/s" if on_gpu else "shares of the bandwidth of a plain copy of the largest message"
    rows = [
        [show_bytes(size.message), *(bandwidth(size, k, scale).show(".2g") for k in every)]
        for size in found
    ]
    fitted = [fit_row(kind, lines[kind], scale, on_gpu, ranks) for kind in KINDS]
    latency = ["latency, µs"] if on_gpu else []
    header = ["", "bandwidth", "half of it at", *latency, "off by at most"]
    return "\n\n".join(
        [
            "# Collectives against message size",
            f"{ranks} ranks, {nodes} node(s), {'NCCL' if on_gpu else 'Gloo'}; "
            f"{len(found[0].seconds[COPY])} rounds in "
            f"which all kinds have a turn: median (least–most). Bandwidths in {what}: bytes that "
            "leave a rank, on average, by the seconds of the slowest rank. A message is what one "
            "rank sends, to itself too; of an all-gather, what all ranks have together. *Uneven* "
            "sends the n-th rank an n-th of what the first gets. *Of moetrain* makes room for what "
            "comes every time, as a layer does; the others write to memory that is there. *Copy* "
            "moves the whole message on its rank, each rank its own.",
            record.table(["message", *KINDS, COPY], rows),
            f"![Bandwidth by message size]({name}.png)",
            "## Latency and bandwidth",
            "seconds = latency + bytes / bandwidth, with the least squares of relative deviations. "
            "*Half of it at*: the message that gets half of the bandwidth, all of it counted.",
            record.table(header, fitted),
        ]
    )


def fit_row(kind: str, fitted: fits.Transport, scale: float, on_gpu: bool, ranks: int) -> list[str]:
    half = show_bytes(fitted.half * ranks / (ranks - 1))
    latency = [f"{fitted.latency * 1e6:.1f}"] if on_gpu else []
    return [kind, f"{fitted.bandwidth / scale:.2g}", half, *latency, f"{fitted.off:.0%}"]


def show_bytes(number: float) -> str:
    """As 10 KiB, with two digits at least."""
    names = ["B", "KiB", "MiB", "GiB"]
    while number >= 1024 and len(names) > 1:
        number /= 1024
        names.pop(0)
    return f"{number:.{int(number < 10 and number % 1 > 0)}f} {names[0]}"


def draw(found: list[Size], lines: dict[str, fits.Transport], name: str, on_gpu: bool) -> None:
    plt = record.pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    scale, messages = unit(found, on_gpu), [size.message for size in found]
    for kind, colour in zip(KINDS, COLOURS, strict=True):
        bands = [bandwidth(size, kind, scale) for size in found]
        medians, least, most = zip(*bands, strict=True)
        axes.fill_between(messages, least, most, color=colour, alpha=0.15, linewidth=0)
        axes.plot(messages, medians, "o-", color=colour, label=kind, markersize=3.5)
        fitted = lines[kind]
        shape = [s.sent / (fitted.latency + s.sent / fitted.bandwidth) / scale for s in found]
        axes.plot(messages, shape, ":", color=colour, linewidth=1)
    copies = [bandwidth(size, COPY, scale).median for size in found]
    axes.plot(messages, copies, "--", color="black", linewidth=1, label="a plain copy")
    what = "GB/s" if on_gpu else "of a copy of the largest message"
    axes.set(xscale="log", yscale="log", xlabel="message", ylabel=f"bandwidth ({what})")
    axes.set_xticks(messages, [show_bytes(message) for message in messages], fontsize=8)
    axes.minorticks_off()
    axes.set_title("dotted: latency + bytes / bandwidth", fontsize=9, color="#555555")
    axes.legend(fontsize=8)
    figure.savefig(record.RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
