"""What a recorded routing would have come to under other settings: drops, padding, traffic.

Every layer of every step is routed again from its record, micro-batch by micro-batch, by the code
that routes in training. So for the recorded setting every count is the live one, and for another
capacity factor, drop policy, group or layout it is what the same choices would have led to. (A run
trained so would have learned other choices, by and by.)

Shape suffixes: B micro-batches of a step, in the order of samples, J of them on each rank; W ranks,
P of them in an expert group; E experts, O outcomes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple, TypedDict

import torch

from moetrain import settings
from moetrain.build import routing_group_tokens
from moetrain.config import Config
from moetrain.constraints import check_world
from moetrain.errors import UserError
from moetrain.metrics import LayerLine, Rates, layer_line, rates
from moetrain.moe import Draws, Ledger, Preferences, capacity
from moetrain.moe.keyed import step_key
from moetrain.moe.layer import DropPolicy, GroupName, Routed, place
from moetrain.moe.ledger import gate_mass, ledger
from moetrain.moe.preferences import routing_of
from moetrain.objective import LayerMeans
from moetrain.sinks import METRICS_FILE
from moetrain.trace import Record, Trace
from moetrain.traffic import row_bytes, row_trips

OTHER_TOP_K = ("topk", "noisy_topk", "sigmoid", "hash", "random")
"""Gates whose ranking does not depend on how many choices are taken of it."""


class Setting(NamedTuple):
    """A question: what differs from the recorded run. None: as it was at each step."""

    capacity_factor: float | Literal["recorded"] | None = "recorded"
    """None is dropless."""
    drop_policy: DropPolicy | None = None
    group: GroupName | int | None = None
    min_capacity: int | None = None
    spill_depth: int | None = None
    top_k: int | None = None
    ep: int | None = None
    world: int | None = None
    """Where it is not given, the recorded number of ranks, or `ep` where that does not divide it.
    Micro-batches become smaller where the batch has too few for so many ranks."""


class TrafficLine(TypedDict):
    """The rows of one MoE layer on their way between ranks over one optimizer step, in bytes, by
    the dispatcher all_to_all. 0 where every rank holds all experts."""

    all_to_all_bytes: float
    """What a rank sends there and back in all passes, the mean over ranks: with what it sends to
    itself and with empty slots, as `moetrain check` has it."""
    link_bytes: list[list[int]]
    """Filled rows from every rank to every rank of its expert group, itself too, one way."""
    mean_link_bytes: float
    """Mean of those between two different ranks."""
    max_link_bytes: int
    """The most of those between two different ranks."""
    mean_sent_bytes: float
    """Mean between two different ranks with empty slots, of which all links have as many."""
    rank_rows: list[int]
    """Filled rows that each rank computes."""
    straggler_factor: float
    """Filled rows of the busiest rank of an expert group over the mean of its ranks, all
    all-to-alls of the step together: 1 when even."""


class StepReplay(TypedDict):
    """One step under a setting."""

    step: int
    rates: Rates
    layers: list[LayerLine]
    traffic: list[TrafficLine]


class Replay(NamedTuple):
    """The answer to a question."""

    setting: dict[str, Any]
    """In full, as it was at the last step."""
    steps: list[StepReplay]
    summary: dict[str, float]
    """Means over the steps: of `Rates`, of the bytes a rank sends for all layers together
    (all_to_all_bytes), and of the straggler factor over layers."""


class Ways(NamedTuple):
    """How one step is to be routed."""

    config: Config
    """With the setting over it; the micro-batch fits the number of ranks."""
    world: int
    capacity_factors: list[float | None]
    """Of every layer."""


def settings_of(**values: Sequence[Any]) -> list[Setting]:
    """Every combination of the values of some fields of `Setting`; of a field without values, what
    was recorded. None where there are no values at all."""
    given = {name: of_field for name, of_field in values.items() if of_field}
    rows = product(*given.values()) if given else ()
    return [Setting(**dict(zip(given, row, strict=True))) for row in rows]


def replay(trace: Trace, setting: Setting | None = None) -> Replay:
    """Answer one question; without a setting, what was recorded.

    Raises UserError where the setting is not a legal one, or the trace cannot tell.
    """
    return replay_all(trace, [setting or Setting()])[0]


def replay_all(trace: Trace, wanted: Sequence[Setting]) -> list[Replay]:
    """Answer several questions in one reading of the trace, a step at a time; raises as `replay`
    does."""
    steps: list[list[StepReplay]] = [[] for _ in wanted]
    for setting in wanted:
        ways_of(trace.record(trace.steps[-1]), setting)  # refuse before anything is computed
    shown: list[dict[str, Any]] = [{} for _ in wanted]
    for record in trace.records():
        for number, setting in enumerate(wanted):
            ways = ways_of(record, setting)
            steps[number].append(_replay_step(record, ways))
            shown[number] = _spelled_out(ways)
    return [Replay(*row, _summary(row[1])) for row in zip(shown, steps, strict=True)]


# ---------------------------------------------------------------- settings


def ways_of(record: Record, setting: Setting) -> Ways:
    """The recorded step's settings with others over them. Raises as `replay` does."""
    config, world = _lay_out(record, setting)
    moe = {
        name: value
        for name in ("drop_policy", "group", "min_capacity", "spill_depth", "top_k")
        if (value := getattr(setting, name)) is not None
    }
    factors = record.capacity_factors
    if setting.capacity_factor != "recorded":
        moe["capacity_factor"] = setting.capacity_factor
        factors = [setting.capacity_factor] * len(factors)
    if moe:
        values = config.model_dump(mode="json")
        values["moe"] |= moe
        config = settings.resolve(None, values)
    check_world(config, world)
    ways = Ways(config, world, factors)
    _require_known(record, ways)
    return ways


def _lay_out(record: Record, setting: Setting) -> tuple[Config, int]:
    """The run on other ranks, where those are asked for; nothing but ep is kept of its layout."""
    config, world = record.config, record.world
    if setting.ep is None and setting.world is None:
        return config, world
    ep = setting.ep or config.parallel.ep
    world = setting.world or (world if world % ep == 0 else ep)
    batch, micro = config.train.global_batch, config.train.micro_batch
    if batch % world == 0:
        micro = max(n for n in range(1, micro + 1) if batch // world % n == 0)
    values = config.model_dump(mode="json")
    values["train"]["micro_batch"] = micro
    values["parallel"] = {"ep": ep}
    return settings.resolve(None, values), world


def _require_known(record: Record, ways: Ways) -> None:
    """Raise UserError where the record cannot tell."""
    moe, recorded = ways.config.moe, record.config.moe
    groups_choose = moe.router == "sigmoid" and moe.expert_groups > 1
    if moe.top_k != recorded.top_k and (moe.router not in OTHER_TOP_K or groups_choose):
        limit = " with moe.expert_groups" if groups_choose else ""
        raise UserError(
            f"top_k ({moe.top_k}) cannot be replayed for moe.router {moe.router}{limit}: which "
            f"expert a token ranks where depends on it; keep {recorded.top_k}"
        )
    if moe.router == "expert_choice" and _shape(record.config) != _shape(ways.config):
        raise UserError(
            "moe.router expert_choice cannot be replayed with another capacity_factor, "
            "min_capacity, group or top_k than the recorded ones: its experts choose by them; "
            "record a run with these settings"
        )
    spills = moe.drop_policy == "spill" and any(ways.capacity_factors)
    needed = min(moe.experts, moe.top_k * (1 + moe.spill_depth * spills))
    ranked = record.layers[0].expert_TX.shape[1]
    if needed > ranked:
        of = f"top_k ({moe.top_k})" + (f" and spill_depth ({moe.spill_depth})" if spills else "")
        raise UserError(
            f"{of} may ask for {needed} experts of a token, and the trace ranks {ranked}; record "
            f"with a larger moe.top_k or moe.spill_depth"
        )


def _shape(config: Config) -> tuple[Any, ...]:
    """What the experts of expert_choice choose by."""
    moe, micro = config.moe, config.train.micro_batch
    tokens = micro if moe.group == "microbatch" else 0
    return moe.capacity_factor, moe.min_capacity, moe.group, moe.top_k, tokens


def _spelled_out(ways: Ways) -> dict[str, Any]:
    config, moe, factors = ways.config, ways.config.moe, ways.capacity_factors
    same = len(set(factors)) == 1
    return {
        "capacity_factor": factors[0] if same else factors,
        "drop_policy": moe.drop_policy,
        "group": moe.group,
        "min_capacity": moe.min_capacity,
        "spill_depth": moe.spill_depth,
        "top_k": moe.top_k,
        "ep": config.parallel.ep,
        "world": ways.world,
        "micro_batch": config.train.micro_batch,
    }


# ---------------------------------------------------------------- one step


def _replay_step(record: Record, ways: Ways) -> StepReplay:
    blocks = ways.config.moe.block_indices(ways.config.model.layers)
    means, traffic = [], []
    for block, factor, layer in zip(blocks, ways.capacity_factors, record.layers, strict=True):
        routed = list(_route(record, ways, block, factor, layer))
        means.append(_sum(routed, ways.world))
        traffic.append(_traffic(routed, ways))
    layers = [layer_line(layer) for layer in means]
    together = rates(layers, [layer.ledger for layer in means])
    return StepReplay(step=record.step, rates=together, layers=layers, traffic=traffic)


def _route(
    record: Record, ways: Ways, block: int, factor: float | None, layer: Preferences
) -> Iterator[Routed]:
    """Every micro-batch of a layer, placed as in training."""
    config, moe = ways.config, ways.config.moe
    tokens = config.train.micro_batch * config.data.seq_len
    group_size, slots = routing_group_tokens(config) or tokens, None
    if factor is not None:
        slots = capacity(group_size, moe.experts, moe.top_k, factor, moe.min_capacity)
    k = layer.top_k if moe.top_k == record.config.moe.top_k else moe.top_k
    divides = moe.router != "topk" or moe.renormalize
    key, ids_T = step_key(config.seed, record.step), record.token_id_T
    for start in range(0, len(ids_T), tokens):
        part = slice(start, start + tokens)
        routing = routing_of(Preferences(*(of[part] for of in layer)), moe.experts, k, divides)
        draws = Draws(key, ids_T[part])
        rules = moe.drop_policy, moe.spill_depth
        yield place(routing, group_size, slots, *rules, block, draws)


def _sum(routed: Sequence[Routed], world: int) -> LayerMeans:
    """A layer over all ranks and micro-batches."""
    ledgers = [ledger(part.record, part.settled, part.plan) for part in routed]
    total = Ledger(*(torch.stack(entries).sum(0) for entries in zip(*ledgers, strict=True)))
    outcome_BO = torch.stack([part.outcome_EKO.sum((0, 1)) for part in ledgers])
    outcome_WO = outcome_BO.view(-1, world, outcome_BO.shape[1]).sum(0)
    masses = [torch.stack(gate_mass(part.record, part.plan)).double() for part in routed]
    mass, dropped = torch.stack(masses).sum(0).tolist()
    by_rank = tuple(map(tuple, outcome_WO.tolist()))
    return LayerMeans(total, dropped / mass if mass else 0.0, by_rank)


def _traffic(routed: Sequence[Routed], ways: Ways) -> TrafficLine:
    """The ranks of an expert group are consecutive, and hold consecutive experts."""
    world, ep, size = ways.world, ways.config.parallel.ep, row_bytes(ways.config)
    count_BE = torch.stack([part.plan.count_E for part in routed])
    filled_JWP = count_BE.unflatten(1, (ep, -1)).sum(2).unflatten(0, (-1, world))
    sent_JWP = filled_JWP
    if routed[0].plan.rows_per_expert is not None:
        share_B = torch.tensor([part.plan.source_R.numel() // ep for part in routed])
        sent_JWP = share_B.view(-1, world, 1).expand_as(filled_JWP)
    filled_WP, sent_WP = (rows_JWP.sum(0) * size * (ep > 1) for rows_JWP in (filled_JWP, sent_JWP))
    links_WP = torch.arange(world)[:, None] % ep != torch.arange(ep)
    computed_JGP = filled_JWP.unflatten(1, (-1, ep)).sum(2)
    busiest, mean = int(computed_JGP.amax(2).sum()), int(computed_JGP.sum()) / ep
    return TrafficLine(
        all_to_all_bytes=int(sent_WP.sum()) / world * row_trips(ways.config, world),
        link_bytes=filled_WP.tolist(),
        mean_link_bytes=_mean(filled_WP[links_WP].tolist()),
        max_link_bytes=max(filled_WP[links_WP].tolist(), default=0),
        mean_sent_bytes=_mean(sent_WP[links_WP].tolist()),
        rank_rows=computed_JGP.sum(0).flatten().tolist(),
        straggler_factor=busiest / mean if mean else 0.0,
    )


# ---------------------------------------------------------------- many steps


def _summary(steps: Sequence[StepReplay]) -> dict[str, float]:
    traffic = [line for step in steps for line in step["traffic"]]
    sent = sum(line["all_to_all_bytes"] for line in traffic)
    return {
        **{name: _mean([step["rates"][name] for step in steps]) for name in Rates.__annotations__},
        "all_to_all_bytes": sent / len(steps),
        "straggler_factor": _mean([line["straggler_factor"] for line in traffic]),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


class Comparison(NamedTuple):
    """The replay of what was recorded against the lines of the live run."""

    steps: int
    """That have a line to compare with."""
    differences: list[str]
    """Step, layer and field of each, and both values."""


def compare(recorded: Replay, lines: Sequence[Mapping[str, Any]]) -> Comparison:
    """Hold every count of every layer, and all rates that follow from counts, against
    metrics.jsonl. (The share of gate weight that was dropped is of rounded gates in the trace.)"""
    live = {line["step"]: line["layers"] for line in lines if "layers" in line}
    common = [step for step in recorded.steps if step["step"] in live]
    differences = [
        f"step {step['step']}, layer {number}: {field} is {value} by the trace, and "
        f"{theirs.get(field)} in {METRICS_FILE}"
        for step in common
        for number, (ours, theirs) in enumerate(
            zip(step["layers"], live[step["step"]], strict=True)
        )
        for field, value in ours.items()
        if field != "dropped_gate_mass" and value != theirs.get(field)
    ]
    return Comparison(len(common), differences)
