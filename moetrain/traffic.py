"""Collectives of one optimizer step, their number and their bytes, worked out from shapes.

Nothing is started. Who gathers and reduces what, when: `moetrain.parallel` and the engines; how
rows travel: `moetrain.moe.dispatch`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import ceil, prod
from typing import Literal, NamedTuple

from torch import Tensor

from moetrain.autopilot import FACTORS
from moetrain.build import routing_group_tokens, training_factor
from moetrain.config import Config
from moetrain.constraints import WITHOUT_WEIGHTS
from moetrain.engines.deepspeed_config import bucket_size
from moetrain.model import Block, Transformer
from moetrain.moe import Experts, MoE, Router, capacity
from moetrain.moe.dropout import KEY_COLUMNS
from moetrain.optim import decays
from moetrain.precision import compute_dtype

Kind = Literal["all_gather", "all_reduce", "all_to_all", "reduce_scatter"]
Axis = Literal["world", "dp_shard", "dp_replicate", "edp", "ep", "inside node", "across nodes"]

INT64, FP64 = 8, 8


class Traffic(NamedTuple):
    """Collectives of one kind, for one purpose, among the ranks of one axis."""

    what: str
    kind: Kind
    axis: Axis
    ranks: int
    """That take part in each."""
    count: int
    num_bytes: int
    """Of all their messages. A message is, of an all-gather, what all ranks have together; of a
    reduce-scatter and an all-reduce, what every rank brings; of an all-to-all, what one rank sends,
    to itself too."""


class _Times(NamedTuple):
    """How often a step does what."""

    forward: int
    backward: int
    recompute: int
    """Forward passes of whole layers once more, within the backward pass."""


def traffic(config: Config, model: Transformer, world_size: int) -> list[Traffic]:
    """What one rank takes part in during one optimizer step; groups of one rank are left out.

    `model` may be on the meta device. Rows of dropless experts count as if they were evenly loaded
    and no token were padding: their number is exact, and so are the bytes of all ranks together,
    unless `moe.random_second` leaves second choices out: then those are the most there can be.
    Where `moe.capacity_factor` is auto, rows are those of the largest factor.

    DeepSpeed's are those of its default settings. Where a rank's weights do not fit into one of its
    buckets, the number of reductions is only about right: it cuts no weight in two.
    """
    times = _times(config, world_size)
    engine = _deepspeed if config.engine.kind == "deepspeed" else _fsdp
    found = [
        *engine(config, model, times, world_size),
        *_transport(config, model, times),
        *_statistics(config, model, world_size),
    ]
    return [row for row in found if row.ranks > 1 and row.count]


def row_bytes(config: Config) -> int:
    """Of one token's vector on its way to an expert, or back: the mean of both, since the keys of
    expert dropout go one way."""
    return (config.model.dim + _key_columns(config) // 2) * compute_dtype(config.engine).itemsize


def _key_columns(config: Config) -> int:
    return KEY_COLUMNS if config.moe.expert_dropout else 0


def row_trips(config: Config, world_size: int) -> int:
    """How often the rows of a micro-batch travel in one layer: there and back in every pass."""
    return 2 * sum(_times(config, world_size)) // config.accumulation(world_size)


def _times(config: Config, world_size: int) -> _Times:
    batches = config.accumulation(world_size)
    # The balance of the whole batch is wanted before the first of several backward passes.
    surveys = batches if config.balances_batch and batches > 1 else 0
    full = config.engine.activation_checkpointing == "full"
    return _Times(batches + surveys, batches, batches if full else 0)


# ---- weights and gradients: FSDP2 ----------------------------------------------------------------


def _fsdp(config: Config, model: Transformer, times: _Times, world_size: int) -> Iterator[Traffic]:
    """Every unit is gathered for every pass, but that of the root stays for the backward pass; and
    reduced once, with the last micro-batch."""
    replicas, shard = config.parallel.dp_replicate, config.dp_shard(world_size)
    same = shard // config.parallel.ep
    compute = compute_dtype(config.engine).itemsize
    master = max(4, compute)
    root, blocks, experts = _units(model, shard, config.parallel.ep)
    passes, steps = times.forward + times.backward, times.backward

    gathered = steps * root + passes * sum(blocks)
    count = steps + passes * len(blocks)
    yield Traffic("weights", "all_gather", "dp_shard", shard, count, gathered * compute)
    count, numel = passes * len(experts), passes * sum(experts)
    yield Traffic("experts' weights", "all_gather", "edp", same, count, numel * compute)

    dense = root + sum(blocks)
    trained = [] if "experts" in config.train.freeze else experts
    units: list[tuple[str, Axis, int, int, int]] = [
        ("gradients", "dp_shard", shard, 1 + len(blocks), dense),
        ("experts' gradients", "edp", same, len(trained), sum(trained)),
    ]
    for what, axis, ranks, count, numel in units:
        yield Traffic(what, "reduce_scatter", axis, ranks, count, numel * master)
        part = numel // ranks * master
        yield Traffic(what, "all_reduce", "dp_replicate", replicas, count, part)
    routers = _numel(w for w in _weights(model, Router) if w.requires_grad)
    count = int(routers > 0)
    num_bytes = routers * master
    yield Traffic("routers' gradients", "all_reduce", "world", world_size, count, num_bytes)


def _units(model: Transformer, shard: int, ep: int) -> tuple[int, list[int], list[int]]:
    """Elements of what is gathered at once: the root; of every block what is neither experts nor
    router, and its experts. Dense weights with the rows that make them divisible."""
    root = _padded([*model.embedding.parameters(), *model.norm.parameters()], shard)
    if model.head is not None:
        root += _padded(model.head.parameters(), shard)
    blocks, experts = [], []
    for block in model.blocks:
        assert isinstance(block, Block)
        apart = set() if block.moe is None else {id(weight) for weight in block.moe.parameters()}
        blocks.append(_padded((w for w in block.parameters() if id(w) not in apart), shard))
        if block.moe is not None:
            experts.append(_numel(block.moe.experts.parameters()) // ep)
    return root, blocks, experts


def _padded(weights: Iterable[Tensor], ranks: int) -> int:
    return sum(ceil(len(w) / ranks) * ranks * prod(w.shape[1:]) for w in weights)


def _numel(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _weights(model: Transformer, kind: type[Router | Experts]) -> list[Tensor]:
    return [
        w for module in model.modules() if isinstance(module, kind) for w in module.parameters()
    ]


# ---- weights and gradients: DeepSpeed ------------------------------------------------------------


def _deepspeed(
    config: Config, model: Transformer, times: _Times, world_size: int
) -> Iterator[Traffic]:
    """Gradients are summed bucket by bucket, at stage 2 with every micro-batch; from stage 1 on,
    each of the optimizer's groups of weights is gathered after the update. All in fp32."""
    stage, ep = config.engine.zero_stage, config.parallel.ep
    spread = {id(weight) for weight in _weights(model, Experts)} if ep > 1 else set()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    dense = [weight for weight in trained if id(weight) not in spread]
    experts = [weight for weight in trained if id(weight) in spread]
    numel = _numel(dense) + _numel(experts) // ep
    rounds = times.backward if stage == 2 else 1
    count = rounds * ceil(numel / bucket_size(config, world_size, numel))
    kinds: list[tuple[str, Axis, int, Sequence[Tensor], int]] = [
        ("", "world", world_size, dense, 1),
        ("experts' ", "edp", world_size // ep, experts, ep),
    ]
    for whose, axis, ranks, weights, shards in kinds:
        if weights:
            num_bytes = rounds * 4 * _numel(weights) // shards
            yield Traffic(f"{whose}gradients", "all_reduce", axis, ranks, count, num_bytes)
            groups = [_numel(w for w in weights if decays(w) == kind) for kind in (True, False)]
            flat = [_aligned(numel // shards, ranks) for numel in groups if numel and stage]
            yield Traffic(f"{whose}weights", "all_gather", axis, ranks, len(flat), 4 * sum(flat))


def _aligned(numel: int, ranks: int) -> int:
    """With what makes the shares of all ranks equal and of even length."""
    return ceil(numel / (2 * ranks)) * 2 * ranks


# ---- rows to the experts and back ----------------------------------------------------------------


def _transport(config: Config, model: Transformer, times: _Times) -> Iterator[Traffic]:
    """See `moetrain.moe.dispatch`. What was sent selective recomputation keeps, full sends anew."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    if not layers or config.parallel.ep == 1:
        return
    travel = _all_gather if config.parallel.dispatch == "all_gather" else _all_to_all
    for row in travel(config, times):
        count, num_bytes = row.count * len(layers), row.num_bytes * len(layers)
        yield row._replace(count=count, num_bytes=num_bytes)


def _all_to_all(config: Config, times: _Times) -> Iterator[Traffic]:
    """One layer's. There and back, every part on every hop, in either pass; dropless, counts first,
    of which there is no gradient."""
    parallel, num_bytes = config.parallel, _rows(config) * row_bytes(config)
    passes, forward = sum(times), times.forward + times.recompute
    for axis, ranks in _hops(config):
        count = 2 * parallel.overlap_chunks * passes
        yield Traffic("rows", "all_to_all", axis, ranks, count, 2 * passes * num_bytes)
        if config.moe.capacity_factor is None:
            counts = config.moe.experts * INT64
            yield Traffic("row counts", "all_to_all", axis, ranks, forward, forward * counts)


def _hops(config: Config) -> list[tuple[Axis, int]]:
    parallel = config.parallel
    if parallel.dispatch == "two_level":
        return [
            ("inside node", parallel.ep // parallel.nodes),
            ("across nodes", parallel.nodes),
        ]
    return [("ep", parallel.ep)]


def _rows(config: Config) -> int:
    """That one rank sends in one pass of one layer, those it keeps and empty slots included."""
    moe, tokens = config.moe, config.train.micro_batch * config.data.seq_len
    factor = training_factor(moe)
    if factor is None:
        return tokens * moe.top_k
    group = routing_group_tokens(config) or tokens
    slots = capacity(group, moe.experts, moe.top_k, factor, moe.min_capacity)
    return moe.experts * tokens // group * slots


def _all_gather(config: Config, times: _Times) -> Iterator[Traffic]:
    """One layer's. Tokens, plans and gates to all; the shares of the sums to their ranks. Their
    gradients go the opposite way, all by all-to-all."""
    ep, moe = config.parallel.ep, config.moe
    compute = compute_dtype(config.engine).itemsize
    tokens, wide = ep * config.train.micro_batch * config.data.seq_len, max(4, compute)
    choices = moe.experts if moe.router == "expert_choice" else moe.top_k
    x = tokens * (config.model.dim + _key_columns(config)) * compute
    gates = tokens * choices * wide
    plans, shares = (tokens * choices + ep * moe.experts) * INT64, tokens * config.model.dim * wide
    forward, backward = times.forward + times.recompute, times.backward
    sent = forward * (x + gates + plans)
    yield Traffic("tokens, gates and plans", "all_gather", "ep", ep, 3 * forward, sent)
    learned = moe.router not in WITHOUT_WEIGHTS
    count = sum(times) + backward * (1 + learned)
    returned = sum(times) * shares + backward * (x + learned * gates)
    yield Traffic("sums and gradients", "all_to_all", "ep", ep, count, returned)


# ---- statistics ----------------------------------------------------------------------------------


def _statistics(config: Config, model: Transformer, world_size: int) -> Iterator[Traffic]:
    """Numbers that all ranks must agree on."""
    moe = config.moe
    layers = sum(isinstance(module, MoE) for module in model.modules())
    for what, count, num_bytes in (
        ("targets, tokens and groups", 1, 3 * INT64),
        ("gradient norm, loss", 1, 2 * FP64),
        *_balance(config, layers),
    ):
        yield Traffic(what, "all_reduce", "world", world_size, count, num_bytes)
    is_frozen = "router" in config.train.freeze
    if moe.router == "sigmoid" and moe.bias_update_rate > 0 and layers and not is_frozen:
        loads = layers * moe.experts * INT64
        yield Traffic("loads of experts", "all_reduce", "world", world_size, 1, loads)
    if moe.capacity_factor == "auto" and layers:
        drops = layers * (1 + len(FACTORS)) * INT64
        yield Traffic("drops by capacity factor", "all_reduce", "world", world_size, 1, drops)


def _balance(config: Config, layers: int) -> Iterator[tuple[str, int, int]]:
    """What a balance loss of the whole batch is made of."""
    if config.balances_batch:
        masses = 2 if config.moe.router in ("noisy_topk", "hierarchical") else 1
        counts = (config.moe.experts + 1) * INT64
        yield "balance of the batch", 2, layers * (counts + masses * config.moe.experts * FP64)
