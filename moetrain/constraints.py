"""What settings must satisfy together.

Pure functions over a `moetrain.config.Config`. Each complaint is one line that names field, value,
what it conflicts with and values that would do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from moetrain.errors import UserError

if TYPE_CHECKING:
    from moetrain.config import Config, ModelConfig, MoEConfig

ROUTERS_OF_FIELD = {
    "moe.jitter": ("switch",),
    "moe.random_second": ("gshard",),
    "moe.renormalize": ("topk", "hierarchical"),
    "moe.gate_scale": ("sigmoid",),
    "moe.bias_update_rate": ("sigmoid",),
    "moe.expert_groups": ("sigmoid", "hierarchical"),
    "moe.top_groups": ("sigmoid", "hierarchical"),
    "moe.allow_noncausal": ("expert_choice",),
}
WITHOUT_WEIGHTS = ("hash", "random", "balanced")
BALANCED_BY_DESIGN = (*WITHOUT_WEIGHTS, "dense", "expert_choice")


def problems(config: Config) -> list[str]:
    """Conflicts between fields that no number of ranks can mend."""
    found = [*_name_problems(config.name), *_head_problems(config.model), *_engine_problems(config)]
    resume = config.checkpoint.resume
    if config.init_from is not None and resume not in ("auto", "never"):
        found.append(
            f"init_from ({config.init_from}) and checkpoint.resume ({resume}) both name a start; "
            "drop one of them"
        )
    if config.data.format == "chat" and config.data.source == "stdlib":
        found.append(
            "data.format (chat) needs conversations, and data.source stdlib is plain text; name a "
            "JSON Lines or Parquet file, or a dataset of the hub"
        )
    if config.moe.experts:
        found += [*_choice_problems(config.moe), *_placement_problems(config)]
        return [*found, *_dispatch_problems(config)]
    if config.parallel.ep > 1:
        found.append(
            f"parallel.ep ({config.parallel.ep}) needs experts to share, but moe.experts is 0; "
            "set parallel.ep to 1"
        )
    return found


def check_world(config: Config, world_size: int, local_world: int | None = None) -> None:
    """Raise `UserError`, with one line per problem, if the config cannot run on so many ranks.

    `local_world` is the number of ranks on each node, where it is known.
    """
    if world_size < 1:
        raise UserError(f"world size ({world_size}) must be at least 1")
    found = [*mesh_problems(config, world_size), *_batch_problems(config, world_size)]
    if local_world is not None:
        found += node_problems(config, local_world)
    if found:
        raise UserError("\n".join(found))


def padded_vocab_size(config: Config, tokenizer_size: int) -> int:
    """Rows of the embedding for a tokenizer with so many ids; UserError if they are too few."""
    rows = config.model.vocab_size or tokenizer_size
    if rows < tokenizer_size:
        raise UserError(
            f"model.vocab_size ({rows}) must be at least the {tokenizer_size} ids of "
            f"data.tokenizer ({config.data.tokenizer}); try {tokenizer_size}, "
            f"{-(-tokenizer_size // 128) * 128} (a multiple of 128) or null"
        )
    return rows


def spell(value: object) -> str:
    """A value as YAML and flags write it."""
    if value is None:
        return "null"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(spell, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _name_problems(name: str) -> Iterator[str]:
    if re.fullmatch(r"[A-Za-z0-9._-]{1,128}", name) and name not in (".", ".."):
        return
    suggestion = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:128] or "run"
    yield (
        f"name ({name}) must be 1 to 128 letters, digits, '.', '_' or '-', and neither '.' nor "
        f"'..', because it names a folder inside out; try {suggestion}"
    )


def _head_problems(model: ModelConfig) -> Iterator[str]:
    dim, heads, kv_heads, head_dim = model.dim, model.heads, model.kv_heads, model.head_dim
    if head_dim is not None:
        if head_dim % 2:
            even = _multiples(head_dim, 2)
            yield f"model.head_dim ({head_dim}) must be even (rotary positions); try {even}"
    elif dim % 2:
        yield f"model.dim ({dim}) must be even (rotary positions); try {_multiples(dim, 2)}"
    elif dim % heads or (dim // heads) % 2:
        yield (
            f"model.heads ({heads}) must divide model.dim ({dim}) into heads of even width "
            f"(rotary positions); try {nearest(divisors(dim // 2), heads)}, or set model.head_dim"
        )
    if kv_heads and heads % kv_heads:
        yield (
            f"model.kv_heads ({kv_heads}) must divide model.heads ({heads}); "
            f"try {nearest(divisors(heads), kv_heads)}"
        )


def _engine_problems(config: Config) -> Iterator[str]:
    """What DeepSpeed cannot do; `moetrain.engines.deepspeed_config` compares it with its JSON."""
    engine, replicas = config.engine, config.parallel.dp_replicate
    if engine.compile and engine.activation_checkpointing == "selective":
        yield (
            "engine.activation_checkpointing (selective) is what the compiler decides by itself "
            "where engine.compile is true; set it to none or full"
        )
    if engine.kind != "deepspeed":
        return
    if engine.zero_stage == 3:
        yield (
            "engine.zero_stage (3) shards weights, too, but DeepSpeed takes no expert layers there "
            "other than its own; set it to 0, 1 or 2, or engine.kind to torch, which shards weights"
        )
    if engine.precision == "fp64":
        yield (
            "engine.precision (fp64) is nothing that DeepSpeed reduces; set it to fp32 or bf16, or "
            "engine.kind to torch"
        )
    if replicas > 1:
        yield (
            f"parallel.dp_replicate ({replicas}) makes copies of a sharded model, but ZeRO shares "
            "the optimizer's state over all ranks and has the whole of the dense weights on each; "
            "set it to 1, or engine.kind to torch"
        )


def _choice_problems(moe: MoEConfig) -> Iterator[str]:
    experts, top_k, router = moe.experts, moe.top_k, moe.router
    needed = {"switch": 1, "gshard": 2, "dense": experts}.get(router, top_k)
    if top_k != needed:
        yield (
            f"moe.top_k ({top_k}) must be {needed} for moe.router {router}; "
            f"set moe.top_k to {needed} or moe.router to topk"
        )
    elif experts < 2 and router in ("gshard", "hierarchical"):
        yield f"moe.experts ({experts}) must be at least 2 for moe.router {router}; try 4 or 8"
    elif experts < top_k:
        legal = "1" if experts == 1 else f"1 to {experts}"
        yield f"moe.top_k ({top_k}) must not exceed moe.experts ({experts}); try {legal}"
    elif router in ROUTERS_OF_FIELD["moe.expert_groups"]:
        yield from _group_problems(moe)
    yield from _expert_choice_problems(moe)
    yield from _autopilot_problems(moe)
    yield from _drop_policy_problems(moe)


def _group_problems(moe: MoEConfig) -> Iterator[str]:
    """Experts in equal groups, and as many choices in each of the groups a token may use."""
    experts, top_k, groups, top_groups = moe.experts, moe.top_k, moe.expert_groups, moe.top_groups
    legal = [n for n in divisors(experts) if n > 1 or moe.router == "sigmoid"]
    if groups not in legal:
        reason = f"divide moe.experts ({experts}) into equal groups"
        if moe.router == "hierarchical":
            reason = f"be at least 2 for moe.router hierarchical and {reason}"
        yield f"moe.expert_groups ({groups}) must {reason}; try {nearest(legal, groups)}"
        return
    if top_groups in (fitting := _fitting_top_groups(experts, groups, top_k)):
        return
    choices = [k for k in range(1, experts + 1) if _fitting_top_groups(experts, groups, k)]
    yield (
        f"moe.top_groups ({top_groups}) must divide moe.top_k ({top_k}) into equal shares that fit "
        f"groups of {experts // groups} experts, and not exceed moe.expert_groups ({groups}); try "
        + (nearest(fitting, top_groups) if fitting else f"moe.top_k {nearest(choices, top_k)}")
    )


def _fitting_top_groups(experts: int, groups: int, top_k: int) -> list[int]:
    size = experts // groups
    return [n for n in divisors(top_k) if n <= groups and top_k // n <= size]


def _expert_choice_problems(moe: MoEConfig) -> Iterator[str]:
    if moe.router != "expert_choice":
        return
    if not moe.allow_noncausal:
        yield (
            "moe.router (expert_choice) lets a token's experts depend on later tokens, which a "
            "causal model must not see; set moe.allow_noncausal to true to train it all the same, "
            "or moe.router to topk"
        )
    for field in ("capacity_factor", "eval_capacity_factor"):
        if getattr(moe, field) is None:
            yield (
                f"moe.{field} (null) cannot be dropless for moe.router expert_choice, where the "
                "capacity is how many tokens an expert takes; try 1.0"
            )


def _autopilot_problems(moe: MoEConfig) -> Iterator[str]:
    """Where no drops could be foretold, or there is nothing to choose by them."""
    if moe.capacity_factor != "auto":
        return
    if moe.router in ("expert_choice", "dense"):
        why = "the capacity is how many tokens an expert takes"
        if moe.router == "dense":
            why = "every expert is asked by every token, so that 1.0 drops nothing"
        yield (
            f"moe.capacity_factor (auto) has nothing to go by with moe.router {moe.router}, where "
            f"{why}; try 1.0"
        )
    if moe.drop_policy == "spill":
        yield (
            "moe.capacity_factor (auto) goes by what each factor would have dropped, which with "
            "moe.drop_policy spill is not known without running it; set moe.drop_policy to "
            "position, or moe.capacity_factor to a number such as 1.25"
        )


def _drop_policy_problems(moe: MoEConfig) -> Iterator[str]:
    """Policies that could never act."""
    policy, router = moe.drop_policy, moe.router
    reason = None
    if policy != "position" and router == "expert_choice":
        reason = "moe.router expert_choice drops nothing: no expert takes more than its capacity"
    elif policy == "probability" and (router in WITHOUT_WEIGHTS or one_gate_is_all(moe)):
        reason = f"all gates of moe.router {router} with moe.top_k ({moe.top_k}) are equal"
    elif policy == "spill" and experts_to_spill_to(moe) < 1:
        reason = f"with moe.top_k ({moe.top_k}) every expert open to a token is chosen already"
    if reason:
        yield f"moe.drop_policy ({policy}) cannot act, because {reason}; set it to position"


def one_gate_is_all(moe: MoEConfig) -> bool:
    """Whether a token's only gate is divided by itself."""
    divides = moe.router in ("noisy_topk", "sigmoid") or (
        moe.router in ROUTERS_OF_FIELD["moe.renormalize"] and moe.renormalize
    )
    return moe.top_k == 1 and divides


def experts_to_spill_to(moe: MoEConfig) -> int:
    """Experts open to a token beyond its choices; sigmoid closes those of the other groups."""
    is_limited = moe.router == "sigmoid" and moe.top_groups <= moe.expert_groups
    open_to_all = moe.experts // moe.expert_groups * moe.top_groups if is_limited else moe.experts
    return open_to_all - moe.top_k


def _placement_problems(config: Config) -> Iterator[str]:
    moe, ep, layers = config.moe, config.parallel.ep, config.model.layers
    if moe.experts % ep:
        yield (
            f"moe.experts ({moe.experts}) must be divisible by parallel.ep ({ep}); "
            f"try {_multiples(moe.experts, ep)}, "
            f"or parallel.ep {nearest(divisors(moe.experts), ep)}"
        )
    if not moe.block_indices(layers):
        yield (
            f"moe.every ({moe.every}) and moe.first_dense ({moe.first_dense}) leave none of "
            f"model.layers ({layers}) for experts; try moe.every 1 and moe.first_dense 0, "
            "or moe.experts 0 for a dense model"
        )
    if isinstance(moe.group, int) and config.data.seq_len % moe.group:
        yield (
            f"moe.group ({moe.group}) must divide data.seq_len ({config.data.seq_len}); "
            f"try {nearest(divisors(config.data.seq_len), moe.group)}, sequence or microbatch"
        )


def _dispatch_problems(config: Config) -> Iterator[str]:
    """How tokens travel, where they do: with experts on several ranks."""
    parallel = config.parallel
    ep, chunks, nodes = parallel.ep, parallel.overlap_chunks, parallel.nodes
    if ep == 1:
        return
    held, rest = divmod(config.moe.experts, ep)
    if parallel.dispatch == "all_gather" and chunks > 1:
        yield (
            f"parallel.overlap_chunks ({chunks}) must be 1 for parallel.dispatch all_gather, which "
            "sends all tokens at once; set it to 1, or parallel.dispatch to all_to_all"
        )
    elif rest == 0 and held % chunks:
        yield (
            f"parallel.overlap_chunks ({chunks}) must divide the experts of a rank ({held} = "
            f"moe.experts {config.moe.experts} / parallel.ep {ep}); "
            f"try {nearest(divisors(held), chunks)}"
        )
    if parallel.dispatch == "two_level" and (nodes == 1 or ep % nodes):
        legal = [n for n in divisors(ep) if n > 1]
        yield (
            f"parallel.nodes ({nodes}) must divide parallel.ep ({ep}) and be at least 2 for "
            f"parallel.dispatch two_level; try {nearest(legal, nodes)}, "
            "or parallel.dispatch all_to_all"
        )


def node_problems(config: Config, local_world: int) -> Iterator[str]:
    """What keeps nodes of so many ranks from being those that the dispatcher has been told of."""
    ep, nodes = config.parallel.ep, config.parallel.nodes_apart
    if nodes > 1 and local_world % (ep // nodes):
        legal = [n for n in divisors(ep) if n > 1 and local_world % (ep // n) == 0]
        yield (
            f"parallel.nodes ({nodes}) puts {ep // nodes} = parallel.ep {ep} / {nodes} ranks that "
            f"share experts on each node, which must divide the ranks of a node ({local_world}); "
            f"try parallel.nodes {nearest(legal, nodes)}"
        )


def mesh_problems(config: Config, world_size: int) -> Iterator[str]:
    """What keeps a number of ranks from sharing the model as configured."""
    replicas, ep = config.parallel.dp_replicate, config.parallel.ep
    if world_size % replicas:
        yield (
            f"parallel.dp_replicate ({replicas}) must divide the world size ({world_size}); "
            f"try {nearest(divisors(world_size), replicas)}"
        )
        return
    dp_shard = config.dp_shard(world_size)
    if dp_shard % ep:
        legal = divisors(math.gcd(dp_shard, config.moe.experts))
        yield (
            f"parallel.ep ({ep}) must divide dp_shard ({dp_shard} = world size {world_size} / "
            f"parallel.dp_replicate {replicas}); try {nearest(legal, ep)}, "
            f"or a world size of {_multiples(world_size, ep * replicas)}"
        )
    elif config.moe.experts:
        yield from _sharding_problems(config, dp_shard)


def _sharding_problems(config: Config, dp_shard: int) -> Iterator[str]:
    """Ranks that hold the same experts share every matrix by equal numbers of rows."""
    ep, rows = config.parallel.ep, math.gcd(config.model.dim, config.expert_ffn_dim)
    if rows % (dp_shard // ep) == 0:
        return
    sizes = divisors(math.gcd(dp_shard, config.moe.experts))
    legal = [size for size in sizes if rows % (dp_shard // size) == 0]
    yield (
        f"model.dim ({config.model.dim}) and the width of an expert ({config.expert_ffn_dim}) must "
        f"be divisible by the number of ranks that hold the same experts ({dp_shard // ep} = "
        f"dp_shard {dp_shard} / parallel.ep {ep}); try another world size"
        + (f", or parallel.ep {nearest(legal, ep)}" if legal else "")
    )


def _batch_problems(config: Config, world_size: int) -> Iterator[str]:
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % world_size:
        yield (
            f"train.global_batch ({batch}) must be divisible by the world size ({world_size}); "
            f"try {_multiples(batch, world_size)}"
        )
    elif batch % (micro * world_size):
        yield (
            f"train.global_batch ({batch}) must be train.micro_batch ({micro}) × world size "
            f"({world_size}) × a whole number of accumulation steps; try train.micro_batch "
            f"{nearest(divisors(batch // world_size), micro)}"
        )


def divisors(n: int) -> list[int]:
    """Ascending, from 1 to n."""
    small = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def nearest(values: list[int], wanted: int, most: int = 5) -> str:
    """A few of the values in words, those that are nearest to what was wanted."""
    *rest, last = sorted(sorted(values, key=lambda value: abs(value - wanted))[:most])
    return f"{', '.join(map(str, rest))} or {last}" if rest else str(last)


def _multiples(value: int, factor: int) -> str:
    below, above = value // factor * factor, -(-value // factor) * factor
    return f"{below} or {above}" if below else str(above)
