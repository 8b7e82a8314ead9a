"""What a configuration means on a number of ranks, worked out without starting any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from moetrain import engines
from moetrain.autopilot import FACTORS
from moetrain.build import build_model, routing_group_tokens, training_factor
from moetrain.config import Config
from moetrain.data import is_on_hub, load_tokenizer
from moetrain.memory import memory
from moetrain.model import Block, Transformer
from moetrain.moe import MoE, capacity
from moetrain.sizes import sizes, train_flops_per_token
from moetrain.traffic import traffic

_BLOCKS = 15
"""Width of the column that numbers blocks."""
_KIND = 54
"""Width of the column that says what a block is."""


def report(config: Config, world_size: int) -> str:
    """Mesh, layers, parameters, tokens per step, memory and collectives per device, as text.

    The configuration must have passed `constraints.check_world`. Raises UserError where the
    engine cannot run it, or the tokenizer, whose vocabulary the model needs, cannot be loaded.
    """
    engines.check(config, world_size)
    vocab_size = _vocab_size(config)
    model = build_model(config, vocab_size)
    sections = (
        _mesh(config, world_size),
        _layers(model),
        _routing(config),
        _parameters(config, model),
        _step(config, world_size),
        _memory(config, model, vocab_size, world_size),
        _traffic(config, model, world_size),
    )
    return "\n".join("\n".join(lines) for section in sections if (lines := list(section)))


def _vocab_size(config: Config) -> int:
    """The tokenizer's, which is not asked over the network where the configuration will do."""
    if config.model.vocab_size is not None and is_on_hub(config.data.tokenizer):
        return config.model.vocab_size
    return load_tokenizer(config.data.tokenizer).vocab_size


def _mesh(config: Config, world_size: int) -> Iterator[str]:
    """Who is who: the rank order of `moetrain.mesh`."""
    replicas, ep, experts = config.parallel.dp_replicate, config.parallel.ep, config.moe.experts
    shard = config.dp_shard(world_size)
    yield f"mesh       {world_size} ranks = dp_replicate {replicas} × dp_shard {shard}"
    if not experts:
        return
    each = experts // ep
    yield (
        f"           dp_shard {shard} = edp {shard // ep} × ep {ep}:"
        f" {each} of {experts} experts per rank"
    )
    if ep > 1:
        groups = [_span(group) for group in expert_groups(world_size, ep)]
        yield f"           {config.parallel.dispatch} among ranks {_some(groups)}"
    yield from _some_lines(
        f"           {_counted('expert', range(i * each, (i + 1) * each))}"
        f" on {_counted('rank', ranks)}"
        for i, ranks in enumerate(holders(world_size, ep))
    )


def expert_groups(world_size: int, ep: int) -> list[range]:
    """The ranks of every expert-parallel group, which share all experts."""
    return [range(first, first + ep) for first in range(0, world_size, ep)]


def holders(world_size: int, ep: int) -> list[range]:
    """The ranks that hold the same experts, for every part of the experts in turn."""
    return [range(first, world_size, ep) for first in range(ep)]


def _span(numbers: range) -> str:
    return f"{numbers[0]}-{numbers[-1]}" if len(numbers) > 1 else f"{numbers[0]}"


def _counted(what: str, numbers: range) -> str:
    """expert 1, experts 2-3, ranks 0, 4, 8."""
    shown = _span(numbers) if numbers.step == 1 else _some(numbers)
    return f"{what}{'s' * (len(numbers) > 1)} {shown}"


def _some(items: Sequence[object]) -> str:
    """All of a short list, the ends of a long one."""
    shown = items if len(items) <= 4 else [*items[:2], "…", items[-1]]
    return ", ".join(map(str, shown))


def _some_lines(lines: Iterable[str]) -> list[str]:
    every = list(lines)
    return every if len(every) <= 8 else [*every[:2], "           …", every[-1]]


def _layers(model: Transformer) -> Iterator[str]:
    """One line for all blocks that are alike."""
    alike: dict[str, list[int]] = {}
    for index, block in enumerate(model.blocks):
        alike.setdefault(_layer(block), []).append(index)  # type: ignore[arg-type]
    columns = f"{'feed-forward':{_KIND}s} {'parameters':>14s} {'active':>11s}"
    yield f"layers     {'blocks':{_BLOCKS}s} {columns}  of each"
    for row, indices in alike.items():
        yield f"           {_some(list(_spans(indices))):{_BLOCKS}s} {row}"


def _spans(indices: list[int]) -> Iterator[str]:
    """Neighbours together: 0, 1, 2, 4 are 0-2 and 4."""
    for _, pairs in groupby(enumerate(indices), lambda pair: pair[1] - pair[0]):
        _, (first, *others) = zip(*pairs, strict=True)
        yield _span(range(first, (others or [first])[-1] + 1))


def _layer(block: Block) -> str:
    total = sum(p.numel() for p in block.parameters())
    active, kind = total, "dense"
    if block.moe is not None:
        experts, top_k = block.moe.num_experts, block.moe.gate.top_k
        of_one = sum(p.numel() for p in block.moe.experts.parameters()) // experts
        active -= of_one * (experts - top_k)
        kind = _kind(block, block.moe)
    return f"{kind:{_KIND}s} {total:14,} {active:11,}"


def _kind(block: Block, moe: MoE) -> str:
    """Gate, drop policy where anything can be dropped, and shared experts."""
    kind = f"{moe.gate.name}, {moe.gate.top_k} of {moe.num_experts} experts"
    has_capacity = any(factor is not None for factor in moe.factors.values())
    if has_capacity and moe.gate.name != "expert_choice":
        kind += f", drop policy {moe.drop_policy}"
    if block.feed_forward is not None:
        kind += " + shared"
    if block.shared_gate is not None:
        kind += f" ({block.shared_gate.kind})"
    return kind


def _routing(config: Config) -> Iterator[str]:
    moe = config.moe
    if not moe.experts:
        return
    group = routing_group_tokens(config) or config.train.micro_batch * config.data.seq_len
    chosen = f"{moe.top_k} of {moe.experts} experts for each"
    if moe.router == "expert_choice":
        chosen = f"whose slots the {moe.experts} experts fill by themselves"
    yield f"routing    groups of {group} tokens, {chosen}"
    for name, factor in (
        ("training", training_factor(moe)),
        ("evaluation", moe.eval_capacity_factor),
    ):
        if factor is None:
            yield f"           {name}: dropless"
            continue
        slots = capacity(group, moe.experts, moe.top_k, factor, moe.min_capacity)
        effective = slots * moe.experts / (moe.top_k * group)
        yield (
            f"           {name}: {slots} slots per expert and group, capacity factor {factor}"
            f" (effective {effective:.4g})"
        )
    if moe.capacity_factor == "auto":
        tried = ", ".join(map(str, FACTORS[:-1]))
        yield f"           auto: training may go down to {tried}; all below is for {FACTORS[-1]}"


def _parameters(config: Config, model: Transformer) -> Iterator[str]:
    counted = sizes(model)
    flops = train_flops_per_token(model, config.data.seq_len)
    yield f"parameters {counted.total:,} in total, {counted.active:,} active per token"
    yield f"           {flops / 1e9:.4g} GFLOP per token, forward and backward"


def _step(config: Config, world_size: int) -> Iterator[str]:
    train, seq_len = config.train, config.data.seq_len
    tokens, accumulation = train.global_batch * seq_len, config.accumulation(world_size)
    yield (
        f"step       {tokens:,} tokens = {world_size} ranks × {accumulation} micro-batches"
        f" × {train.micro_batch} sequences × {seq_len} tokens"
    )
    yield f"           {train.steps:,} steps, {tokens * train.steps:,} tokens in the run"


def _memory(config: Config, model: Transformer, vocab_size: int, world_size: int) -> Iterator[str]:
    rows = memory(config, model, vocab_size, world_size)
    yield "memory     per device, in GiB"
    for name, num_bytes in (*rows, ("together", sum(row.num_bytes for row in rows))):
        yield f"           {name:19s} {num_bytes / 2**30:9.3f}"
    if config.checkpoint.every and config.checkpoint.asynchronous:
        copied = sum(row.num_bytes for row in rows if row.name in ("weights", "Adam moments"))
        yield f"           {'host, to save from':19s} {copied / 2**30:9.3f}"


def _traffic(config: Config, model: Transformer, world_size: int) -> Iterator[str]:
    """Nothing for one rank, which is alone."""
    rows = traffic(config, model, world_size)
    if rows:
        columns = f"{'among':17s} {'number':>7s} {'bytes':>18s}"
        yield f"traffic    {'of one rank in a step':42s} {columns}"
    for what, kind, axis, ranks, count, num_bytes in rows:
        yield f"           {what:27s} {kind:14s} {f'{axis} {ranks}':17s} {count:7,} {num_bytes:18,}"
