"""What is trained does not depend on the layout: Gloo processes against one process.

Every case runs on simulated ranks (test_parity.py), two of them in every way to spread and send
(test_matrix.py); here are the others that may meet processes as they do not meet threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import parity
import pytest
import torch
from layouts import BATCH, Case, Layout, Text, pick, rotated, spread
from parity import agree, alone, build_run, on_rank

from moetrain.config import Config
from moetrain.moe import MoE
from moetrain.objective import reduce
from moetrain.step import Position, train_step
from moetrain.testing import RankPool

TWO_RANKS = (
    Layout(2, ep=2, dp_replicate=1, micro=4),
    Layout(2, ep=1, dp_replicate=1, micro=1),
    Layout(2, ep=2, dp_replicate=1, micro=1),
)
FOUR_RANKS = (
    Layout(4, ep=4, dp_replicate=1, micro=4),
    Layout(4, ep=2, dp_replicate=1, micro=4),
    Layout(4, ep=2, dp_replicate=2, micro=1),
    Layout(4, ep=4, dp_replicate=1, micro=1),
    Layout(4, ep=1, dp_replicate=2, micro=4),
)
EP4 = FOUR_RANKS[0]
TOPK, TOPK_DROPLESS = (pick("topk", dropless=dropless) for dropless in (False, True))
SWITCH, GSHARD, SIGMOID, LIMITED, HIERARCHICAL = (
    pick(name, dropless=False)
    for name in ("switch", "gshard", "sigmoid", "limited", "hierarchical")
)
"""SWITCH and LIMITED spill; SIGMOID, LIMITED and HIERARCHICAL balance the batch."""
AT_TWO = rotated(
    (SWITCH, GSHARD, pick("noisy_topk", dropless=True), pick("expert_choice", group=4)), TWO_RANKS
)
# At EP 4 each group of LIMITED's and HIERARCHICAL's experts is on a rank of its own, and tokens
# choose from two.
AT_FOUR = rotated(
    (
        LIMITED,
        SIGMOID,
        pick("hierarchical", dropless=True),
        HIERARCHICAL,
        pick("renormalized", dropless=True),
    ),
    FOUR_RANKS,
)
BOTH = pytest.mark.parametrize("case", [TOPK, TOPK_DROPLESS], ids=str)


def compare(pool: RankPool, case: Case, layout: Layout, text: Text, *options: Any) -> list[Any]:
    """Train both ways and compare; returns what each rank has."""
    ranks = pool.run(on_rank, spread(case.config, layout), text, *options)
    agree(ranks, alone(case.config, text, *options))
    return ranks


@pytest.mark.parametrize(("case", "layout"), AT_TWO)
def test_two_ranks_equal_one_process(ranks2: RankPool, case: Case, layout: Layout) -> None:
    """Where tokens went, losses, every gradient, the norm, biases, and the weights after two
    steps."""
    compare(ranks2, case, layout, case.text)


@pytest.mark.parametrize(("case", "layout"), AT_FOUR)
def test_four_ranks_equal_one_process(ranks4: RankPool, case: Case, layout: Layout) -> None:
    compare(ranks4, case, layout, case.text)


@BOTH
@pytest.mark.parametrize("first", [4, 12, 16])
def test_ranks_of_padding_alone(ranks4: RankPool, case: Case, first: int) -> None:
    """1, 3 or all 4 ranks have no token. Peers hang here (DeepSpeed #4808, #5066, #7461)."""
    text = Text(case.documents, empty=frozenset(range(first)))
    for rank in compare(ranks4, case, EP4, text, None, 1):
        (step,) = rank.steps
        if first == BATCH:
            assert step.means[:3] == (0, 0, 0)
            assert not any(grad.any() for grad in step.grads.values())


@BOTH
def test_ranks_whose_experts_nobody_chooses(ranks4: RankPool, case: Case) -> None:
    """No token reaches ranks 2 and 3: no hang, and gradient zero, not none."""
    for rank in compare(ranks4, case, EP4, case.text, parity.opposite_pairs, 1):
        for name, grad in rank.steps[0].grads.items():
            if ".experts." in name:
                assert grad[:6].any(), name
                assert (grad[6:] == 0).all(), name


@pytest.mark.parametrize("case", [SWITCH, HIERARCHICAL, TOPK_DROPLESS, SIGMOID], ids=str)
def test_evaluation_depends_on_no_layout(ranks4: RankPool, case: Case) -> None:
    """Of 11 sequences the ranks get 4, 4, 3 and 0."""
    text = Text(case.documents, sequences=11)
    for means in ranks4.run(parity.evaluated, spread(case.config, EP4), text, 64):
        parity.agree_on_means(means, parity.evaluated_alone(case.config, text, 11), str(EP4))


# ---- bf16 ----------------------------------------------------------------------------------------


class Dtypes(NamedTuple):
    """One step of a rank: its loss, and the dtypes on the way."""

    loss: float
    logits: set[torch.dtype]
    rows: set[torch.dtype]
    weights: set[torch.dtype]
    grads: dict[str, torch.dtype]


def dtypes(config: Config, text: Text) -> Dtypes:
    """Take one step and look."""
    run = build_run(config, text)
    engine: Any = run.engine
    seen = Dtypes(0.0, set(), set(), set(), {})
    for module in engine.model.modules():
        if isinstance(module, MoE):
            module.router.register_forward_hook(
                lambda _, x, record: seen.logits.update(t.dtype for t in record[1:5])
            )
    with parity.dtypes_of_rows() as rows:
        result = train_step(run, Position())
    seen.rows.update(rows)
    seen.weights.update(weight.dtype for weight in engine.engine.weights.values())
    seen.weights.update(bias.dtype for bias in engine.engine.buffers.values())
    seen.grads.update({name: grad.dtype for name, grad in engine.grads.items()})
    return seen._replace(loss=reduce(result.parts, result.counts, run.mesh).loss)


@pytest.mark.parametrize("case", [SWITCH, GSHARD, SIGMOID, TOPK_DROPLESS], ids=str)
def test_bf16_computes_experts_in_bf16_and_routes_in_fp32(ranks2: RankPool, case: Case) -> None:
    """bf16 has 8 bits: losses differ by well under 2^-8 of themselves. Weights stay in fp32."""
    losses = {}
    for precision in ("fp32", "bf16"):
        sections = case.config.model_dump()
        sections["engine"]["precision"] = precision
        config = spread(Config.model_validate(sections), TWO_RANKS[0])
        for seen in ranks2.run(dtypes, config, case.text):
            compute = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            assert seen.rows == {compute}
            assert seen.logits == seen.weights == {torch.float32}
            assert set(seen.grads.values()) == {torch.float32}
            losses[precision] = seen.loss
    assert losses["bf16"] != losses["fp32"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=2**-8)
