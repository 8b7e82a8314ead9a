"""Replay is the live ledger for the recorded setting, and what an oracle says for any other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path
from typing import Any, get_args

import oracle
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from layouts import BATCH, Case, Text
from layouts import GATES as VARIANTS
from models import initialised
from pydantic import ValidationError
from strategies import FACTORS, GATES, MANY, POLICIES, cases, listen
from strategies import Case as Layer

from moetrain.build import build_model
from moetrain.commands.runs import DropPolicy
from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.evaluate import forward
from moetrain.metrics import layer_line
from moetrain.moe import Draws, Ledger, Preferences
from moetrain.moe.keyed import step_key, uniform
from moetrain.moe.preferences import preferences
from moetrain.objective import LayerMeans, Sums, sums
from moetrain.replay import (
    OTHER_TOP_K,
    Setting,
    compare,
    replay,
    replay_step,
    ways_of,
)
from moetrain.trace import Record, Trace, TraceLog, num_ranked
from moetrain.traffic import traffic

# ---- the recorded setting ------------------------------------------------------------------------

WORLD, MICRO, STEP = 2, 4, 3


def legal_config(gate: str, policy: str) -> Config | None:
    limit: Any = "position" if policy == "dropless" else policy
    case = Case(gate, policy == "dropless", limit, "group", "", False, 1, False, False, "sequence")
    try:
        return case.config
    except ValidationError:
        return None


WAYS = {
    (gate, policy): config
    for gate in VARIANTS
    for policy in (*POLICIES, "dropless")
    if (config := legal_config(gate, policy)) is not None
}


def line_of(parts: Sequence[Sums], layer: int, factor: float | None) -> dict[str, Any]:
    """What metrics.jsonl would hold of a layer; the micro-batches go to the ranks in turn."""
    ledgers = [part.ledgers[layer] for part in parts]
    total = Ledger(*(torch.stack(entries).sum(0) for entries in zip(*ledgers, strict=True)))
    by_rank = [
        sum(book.outcome_EKO.sum((0, 1)) for book in ledgers[r::WORLD]) for r in range(WORLD)
    ]
    means = LayerMeans(total, 0.0, tuple(tuple(r.tolist()) for r in by_rank))
    return dict(layer_line(means, factor))


@pytest.mark.parametrize(("gate", "policy"), WAYS)
def test_the_recorded_setting_gives_every_count_of_the_live_run(
    gate: str, policy: str, tmp_path: Path
) -> None:
    """Two ranks with two micro-batches each; some sequences are padded, one is padding alone."""
    made = WAYS[gate, policy]
    config = made.model_copy(update={"train": made.train.model_copy(update={"micro_batch": MICRO})})
    model, text = initialised(config), Text(empty=frozenset({6}))
    key, parts, samples = step_key(config.seed, STEP), [], []
    for start in range(0, BATCH, MICRO):
        samples.append(range(start, start + MICRO))
        batch = text.batch(samples[-1])
        draws = Draws(key, batch.token_id_BL.flatten())
        with torch.no_grad():
            parts.append(sums(forward(model, batch, "train", draws, num_ranked(config.moe))))
    factors = [config.moe.capacity_factor] * len(parts[0].ledgers)
    for rank in range(WORLD):
        mine = [index for indices in samples[rank::WORLD] for index in indices]
        noted = [part.preferences for part in parts[rank::WORLD]]
        TraceLog(tmp_path, config, rank, WORLD).write(STEP, mine, noted, factors)
    trace = Trace.open(tmp_path)
    lines = [
        {"step": STEP, "layers": [line_of(parts, n, factor) for n, factor in enumerate(factors)]}
    ]
    assert compare(replay(trace), lines) == (1, [])
    if policy != "dropless" and gate != "expert_choice":
        dropless = replay(trace, Setting(capacity_factor=None)).steps[0]
        assert dropless["rates"]["drop_rate"] == 0
        assert lines[0]["layers"][0]["dropped"] > 0


# ---- other settings, against the oracle ----------------------------------------------------------

DIM = 4


def record_of(case: Layer, num_ranked: int) -> Record:
    """A step of one layer, in which every group is a sequence."""
    router, record = case.router, case.route(case.leaves())
    config = Config.model_validate(
        {
            "model": {"dim": DIM, "heads": 1, "layers": 1},
            "moe": {
                "experts": case.experts, "top_k": router.k, "router": router.kind,
                "expert_groups": router.groups, "top_groups": router.top_groups,
                "renormalize": router.renormalize, "capacity_factor": case.factor,
            },
            "data": {"seq_len": case.group_size},
            "train": {"global_batch": case.groups, "micro_batch": 1},
        }
    )  # fmt: skip
    layers = [preferences(record, num_ranked)]
    return Record(STEP, config, 1, [case.factor], torch.arange(case.groups), layers)


def priority(record: Record, columns: int) -> list[list[float]]:
    draws = Draws(step_key(record.config.seed, record.step), record.token_id_T)
    return uniform(draws, 0, "drop", columns).tolist()


def answer(case: Layer, record: Record, policy: str) -> oracle.Ledger:
    drawn = priority(record, case.columns) if policy == "random" else None
    rules = oracle.Rules(case.group_size, case.slots, policy, case.depth, drawn)
    heard = listen(case.router, case.leaves(), case.valid, case.given())
    return oracle.route(case.router, heard, rules).ledger


@pytest.mark.parametrize("kind", [kind for kind in GATES if kind != "expert_choice"])
def test_other_settings_agree_with_the_oracle(kind: str) -> None:
    @settings(MANY, max_examples=6)
    @given(case=cases(kind, policy="position"), data=st.data())
    def agree(case: Layer, data: st.DataObject) -> None:
        assume(kind != "hierarchical" or case.router.groups > 1)
        record = record_of(case, case.experts)
        policy = data.draw(st.sampled_from(POLICIES))
        factor = data.draw(st.sampled_from([*FACTORS, None]))
        setting = Setting(factor, policy, None, case.min_capacity, case.depth)  # type: ignore[arg-type]
        try:
            ways = ways_of(record, setting)
        except UserError as refused:  # a policy that could never act
            if not str(refused).startswith("moe.drop_policy ("):
                raise
            assume(False)
        layer = replay_step(record, ways)["layers"][0]
        book = answer(changed(case, factor=factor), record, policy)
        outcomes: Counter[str] = Counter()
        for (_, _, outcome), count in book.outcomes.items():
            outcomes[outcome] += count
        assert {name: layer[name] for name in outcomes} == outcomes  # type: ignore[literal-required]
        assert layer["row_load"] == [book.rows[e] for e in range(case.experts)]
        counts = layer["assigned"], layer["lost_tokens"], layer["slots"]
        assert counts == (book.assigned, book.lost_tokens, book.slots)
        share = book.lost_mass / book.gate_mass if book.gate_mass else 0.0
        assert layer["dropped_gate_mass"] == pytest.approx(share, rel=1e-5)

    agree()


@settings(MANY, max_examples=20)
@given(case=cases(policy="position"), data=st.data())
def test_another_number_of_choices_agrees_with_the_oracle(case: Layer, data: st.DataObject) -> None:
    assume(case.router.kind in OTHER_TOP_K and case.router.groups == 1)
    k = data.draw(st.integers(1, case.experts))
    record = record_of(case, case.experts)
    ways = ways_of(record, Setting(top_k=k, min_capacity=case.min_capacity))
    layer = replay_step(record, ways)["layers"][0]
    other = changed(case, router=changed(case.router, k=k))
    book = answer(other, record, "position")
    assert layer["row_load"] == [book.rows[e] for e in range(case.experts)]
    assert (layer["assigned"], layer["lost_tokens"]) == (book.assigned, book.lost_tokens)
    dropped = sum(n for (_, _, outcome), n in book.outcomes.items() if outcome == "dropped")
    assert layer["dropped"] == dropped


@settings(MANY, max_examples=15)
@given(case=cases(policy="position"), policy=st.sampled_from(["position", "random"]))
def test_drops_are_the_demand_beyond_the_slots_and_fall_with_the_factor(
    case: Layer, policy: Any
) -> None:
    assume(case.router.kind not in ("expert_choice", "hierarchical"))
    record = record_of(case, case.experts)
    (noted,) = record.layers
    wanted = noted.expert_TX[:, : noted.top_k].long()
    asks = noted.sampled_TK & noted.valid_T[:, None]
    demand: Counter[tuple[int, int]] = Counter(
        (token // case.group_size, int(wanted[token, choice]))
        for token, choice in asks.nonzero().tolist()
    )
    dropped = []
    for factor in FACTORS:
        layer = replay_step(record, ways_of(record, Setting(factor, policy)))["layers"][0]
        slots = oracle.capacity(case.group_size, case.experts, case.router.k, factor, 1)
        dropped.append(layer["dropped"])
        assert dropped[-1] == sum(max(0, count - slots) for count in demand.values())
    assert dropped == sorted(dropped, reverse=True)


# ---- traffic -------------------------------------------------------------------------------------


def small_record(experts: Sequence[int], **sections: Any) -> Record:
    """Four sequences of one token, of which each chooses one expert."""
    config = Config.model_validate(
        {
            "model": {"dim": DIM, "heads": 1, "layers": 1},
            "moe": {"experts": 4, "top_k": 1, "capacity_factor": None},
            "data": {"seq_len": 1},
            "train": {"global_batch": len(experts), "micro_batch": 1},
            **sections,
        }
    )
    chosen = torch.tensor(experts, dtype=torch.uint8)[:, None]
    weight, yes = torch.ones(len(experts), 1), torch.ones(len(experts), 1, dtype=torch.bool)
    layer = Preferences(chosen, weight.bfloat16(), yes, yes[:, 0])
    return Record(1, config, 1, [None], torch.arange(len(experts)), [layer])


def test_links_and_stragglers_by_hand() -> None:
    """Experts 0 and 1 are with the first rank of a group, 2 and 3 with the second. Four ranks are
    two groups: token 0 stays, 1 crosses over to rank 0; 2 crosses over to rank 3, 3 stays."""
    size = DIM * 4
    record = small_record([0, 1, 2, 3])
    (line,) = replay_step(record, ways_of(record, Setting(ep=2, world=4)))["traffic"]
    assert line["link_bytes"] == [[size, 0], [size, 0], [0, size], [0, size]]
    assert line["rank_rows"] == [2, 0, 0, 2]
    assert line["straggler_factor"] == 2
    assert (line["mean_link_bytes"], line["max_link_bytes"]) == (2 * size / 4, size)
    assert line["mean_sent_bytes"] == line["mean_link_bytes"]
    assert line["all_to_all_bytes"] == 4 * size  # there and back, forward and backward
    # One group of two with two micro-batches each: {0, 1}, both to rank 0, then {2, 3} to rank 1.
    (line,) = replay_step(record, ways_of(record, Setting(ep=2)))["traffic"]
    assert line["link_bytes"] == [[size, size], [size, size]]
    assert line["rank_rows"] == [2, 2]
    assert line["straggler_factor"] == 2  # each all-to-all waits for one rank
    # With a slot for every expert: each rank sends two rows to either.
    (line,) = replay_step(record, ways_of(record, Setting(1.0, ep=2)))["traffic"]
    assert line["mean_sent_bytes"] == 2 * 2 * size
    assert line["max_link_bytes"] == size
    (line,) = replay_step(record, ways_of(record, Setting()))["traffic"]
    assert (line["all_to_all_bytes"], line["max_link_bytes"]) == (0, 0)
    assert line["straggler_factor"] == 1


@pytest.mark.parametrize("factor", [1.0, 1.25, None])
@pytest.mark.parametrize(("ep", "world"), [(2, 2), (4, 4), (2, 4)])
def test_bytes_are_those_that_check_counts(factor: float | None, ep: int, world: int) -> None:
    moe = {"experts": 4, "top_k": 1, "capacity_factor": 1.0, "balance_scope": "batch"}
    engine = {"precision": "bf16", "activation_checkpointing": "full"}
    record = small_record([0, 1, 1, 3, 0, 1, 2, 3], moe=moe, engine=engine)
    ways = ways_of(record, Setting(factor, ep=ep, world=world))
    (line,) = replay_step(record, ways)["traffic"]
    rows = traffic(ways.config, build_model(ways.config, 257), world)
    assert line["all_to_all_bytes"] == sum(row.num_bytes for row in rows if row.what == "rows")


# ---- what cannot be told -------------------------------------------------------------------------

REFUSED = {
    "capacity": (
        {}, Setting(capacity_factor=0.0), "moe.capacity_factor (0.0) must be greater than 0"
    ),
    "ep": ({}, Setting(ep=3), "moe.experts (4) must be divisible by parallel.ep (3)"),
    "world": ({}, Setting(world=3), "train.global_batch (8) must be divisible by the world size"),
    "group": ({}, Setting(group=2), "moe.group (2) must divide data.seq_len (1)"),
    "ranks": (
        {}, Setting(top_k=2), "top_k (2) may ask for 2 experts of a token, and the trace ranks 1"
    ),
    "spill": (
        {},
        Setting(1.0, "spill", spill_depth=2),
        "top_k (1) and spill_depth (2) may ask for 3 experts of a token",
    ),
    "balanced": (
        {"router": "balanced"}, Setting(top_k=2), "top_k (2) cannot be replayed for moe.router bal"
    ),
    "nodes": (
        {"router": "sigmoid", "expert_groups": 2},
        Setting(top_k=2),
        "for moe.router sigmoid with moe.expert_groups",
    ),
    "experts choose": (
        {"router": "expert_choice", "allow_noncausal": True},
        Setting(capacity_factor=2.0),
        "expert_choice cannot be replayed with another capacity_factor",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("moe", "setting", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_the_trace_cannot_tell_is_refused(
    moe: dict[str, Any], setting: Setting, message: str
) -> None:
    moe = {"experts": 4, "top_k": 1, "capacity_factor": 1.0, **moe}
    record = small_record([0] * 8, moe=moe)
    with pytest.raises(UserError) as error:
        ways_of(record, setting)
    assert message in str(error.value)


def test_policies_of_the_command_line_are_those_of_the_layer() -> None:
    assert get_args(DropPolicy) == POLICIES
