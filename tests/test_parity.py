"""What is trained does not depend on the layout: many simulated ranks against one process."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import parity
import pytest
import torch
from layouts import CASES, CLIP_NORM, EXPERTS, Case, Layout, Text, rotated, spread
from parity import agree, alone, on_rank
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moetrain import objective, optim, parallel, train
from moetrain.config import Config
from moetrain.engines import torch as engines
from moetrain.engines.torch import TorchEngine
from moetrain.moe import OUTCOMES, Draws, MoE
from moetrain.objective import Counts, Sums
from moetrain.testing import simulate_ranks

ACCUMULATED = (Layout(1, 1, 1, micro=1), Layout(1, 1, 1, micro=4), Layout(1, 1, 1, micro=8))
MANY_RANKS = (
    Layout(8, ep=8, dp_replicate=1, micro=2),
    Layout(16, ep=16, dp_replicate=1, micro=1),
    Layout(16, ep=4, dp_replicate=2, micro=1),
)
SWITCH, SWITCH_DROPLESS, GSHARD, TOPK, TOPK_DROPLESS = (CASES[i] for i in (0, 1, 4, 6, 7))


def compare(case: Case, layout: Layout, text: Text | None = None, **options: Any) -> list[Any]:
    """Train both ways and compare; returns what each rank has."""
    text = text or case.text
    ranks = simulate_ranks(
        layout.world, lambda: on_rank(spread(case.config, layout), text, **options)
    )
    agree(ranks, alone(case.config, text, **options))
    return ranks


# ---- any layout ----------------------------------------------------------------------------------


def test_cases_hold_every_pair_of_settings() -> None:
    fields = [field for field in vars(CASES[0]) if field != "jitter"]
    for one, other in itertools.combinations(fields, 2):
        values = [{getattr(case, field) for case in CASES} for field in (one, other)]
        found = {(getattr(case, one), getattr(case, other)) for case in CASES}
        assert found == set(itertools.product(*values)), (one, other)
    with_jitter = {case.capacity_factor for case in CASES if case.jitter}
    assert with_jitter == {1.0, None}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_clips_and_drops(case: Case) -> None:
    """Otherwise agreeing with it would prove little."""
    for step in alone(case.config, case.text).steps:
        assert step.grad_norm > 2 * CLIP_NORM
        for book in step.means.ledgers:
            outcome = dict(zip(OUTCOMES, book.outcome_EKO.sum((0, 1)).tolist(), strict=True))
            assert (outcome["dropped"] > 0) == (case.capacity_factor is not None)
            assert (outcome["not_sampled"] > 0) == (case.router == "gshard")
            assert outcome["kept"] > 0


@pytest.mark.parametrize(("case", "layout"), rotated(ACCUMULATED))
def test_accumulation_equals_the_whole_batch(case: Case, layout: Layout) -> None:
    compare(case, layout)


@pytest.mark.parametrize(("case", "layout"), rotated(MANY_RANKS)[:7])
def test_many_ranks_equal_one_process(case: Case, layout: Layout) -> None:
    """Dropped tokens, losses, every gradient, the norm, and the weights after three steps."""
    compare(case, layout)


def test_experts_start_distinct() -> None:
    """In every layer; `agree` holds each layout to these bits."""
    layers = [
        layer for layer in parity.plain_model(TOPK.config).modules() if isinstance(layer, MoE)
    ]
    experts = [expert for layer in layers for expert in layer.experts.w_down]
    assert len(experts) == TOPK.config.model.layers * EXPERTS
    for one, other in itertools.combinations(experts, 2):
        assert (one != other).any()


# ---- nothing to learn, nothing to choose by ------------------------------------------------------


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_every_label_masked(coefficient: float) -> None:
    """Loss 0 rather than 0/0; what the auxiliary losses want is still learned."""
    text, layout = Text(TOPK.documents, labels=False), Layout(4, ep=2, dp_replicate=1, micro=2)
    sections = TOPK.config.model_dump()
    sections["moe"] |= {"balance_coef": coefficient, "z_loss_coef": coefficient}
    config = Config.model_validate(sections)
    ranks = simulate_ranks(4, lambda: on_rank(spread(config, layout), text, steps=1))
    agree(ranks, alone(config, text, steps=1))
    for step in ranks[0].steps:
        assert step.means.loss == 0
        assert (step.grad_norm > 0) == (coefficient > 0)
        for name, grad in step.grads.items():
            assert grad.isfinite().all(), name


@pytest.mark.parametrize("case", [SWITCH, SWITCH_DROPLESS, GSHARD, TOPK, TOPK_DROPLESS], ids=str)
@pytest.mark.parametrize("ep", [1, 2, 4])
def test_ties_go_to_the_first_experts(case: Case, ep: int) -> None:
    """A router of zeros makes all logits equal, before jitter and after."""
    layout = Layout(ep, ep, dp_replicate=1, micro=4)
    choices = torch.arange(case.config.moe.top_k)
    for rank in compare(case, layout, change=torch.zeros_like, steps=1):
        for table in rank.fates:
            assert ((table[:, 1:] == choices) | (table[:, 1:] == -1)).all()
            assert (table[0, 1:2] == choices[:1]).all()


# ---- evaluation ----------------------------------------------------------------------------------


EVALUATED = (
    *ACCUMULATED,
    Layout(2, 2, 1, 2),
    Layout(4, 2, 2, 1),
    Layout(4, 4, 1, 4),
    MANY_RANKS[0],
)


@pytest.mark.parametrize(("case", "layout"), rotated(EVALUATED))
def test_evaluation_depends_on_no_layout(case: Case, layout: Layout) -> None:
    """Of 11 sequences some ranks get fewer than others, or none; nothing is drawn at random."""
    text = Text(case.documents, sequences=11)
    expected = parity.evaluated_alone(case.config, text, 11)
    for book in expected.ledgers:
        assert not book.outcome_EKO[..., OUTCOMES.index("not_sampled")].any()
    config = spread(case.config, layout)
    for means in simulate_ranks(layout.world, parity.evaluated, config, text, 64):
        parity.agree_on_means(means, expected, str(layout))


# ---- what peers got wrong, planted ---------------------------------------------------------------
# The comparison must notice each of these, and say what is wrong.


def averaged_over_holders(patch: pytest.MonkeyPatch) -> None:
    """FSDP's own divisor, the number of ranks that hold a weight, makes expert gradients P times
    too large beside dense ones (DeepSpeed #5618, pytorch #160285, Megatron-LM #5956)."""
    patch.setattr(FSDPModule, "set_gradient_divide_factor", lambda *_: None)


def experts_times_ep(patch: pytest.MonkeyPatch) -> None:
    """The same bug where dense gradients are right (FastMoE #116)."""
    backward = TorchEngine.backward

    def wrong(engine: TorchEngine, loss: Tensor, last: bool) -> None:
        backward(engine, loss, last)
        experts = [weight for name, weight in engine.weights.items() if ".experts." in name]
        optim.scale_grads(experts, engine.mesh.ep)

    patch.setattr(TorchEngine, "backward", wrong)


def replicas_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """A shard held by two ranks enters the norm twice (DeepSpeed #8475 and its like)."""
    norm = optim.global_grad_norm
    patch.setattr(engines, "global_grad_norm", lambda weights, _: norm(weights, 1))


def each_rank_its_own_norm(patch: pytest.MonkeyPatch) -> None:
    """Every rank clips by what it holds (NeMo Automodel #3816)."""

    def wrong(weights: Iterable[Any], _: int) -> Tensor:
        return torch.nn.utils.get_total_norm([weight.grad.to_local() for weight in weights])

    patch.setattr(engines, "global_grad_norm", wrong)


def experts_left_unclipped(patch: pytest.MonkeyPatch) -> None:
    """One norm for all, but not one clip."""
    right = optim.scale_grads

    def wrong(weights: Iterable[Any], factor: float) -> None:
        right([weight for weight in weights if weight.ndim < 3], factor)

    patch.setattr(engines, "scale_grads", wrong)


def means_of_every_part(patch: pytest.MonkeyPatch) -> None:
    """Auxiliary losses divided by the counts of a rank or micro-batch, of which there are four:
    their weight grows with world size (FastMoE) or accumulation (NeMo Automodel #3359)."""
    right = objective.objective

    def wrong(local: Sums, counts: Counts, balance_coef: float, z_coef: float) -> Tensor:
        return right(local, counts, 4 * balance_coef, 4 * z_coef)

    patch.setattr(train, "objective", wrong)


def first_experts_everywhere(patch: pytest.MonkeyPatch) -> None:
    """Every rank starts from the experts of the first (DeepSpeed #6589, MegaBlocks #160)."""
    right = parallel.initial_value

    def wrong(*others: Any) -> Tensor:
        return right(*others[:-1], experts=range(len(others[-1])))

    patch.setattr(parallel, "initial_value", wrong)


def draws_by_place(patch: pytest.MonkeyPatch) -> None:
    """Random draws that know a token's place in the micro-batch only."""
    patch.setattr(train, "Draws", lambda key, ids: Draws(key, torch.arange(len(ids))))


def name(value: object) -> str:
    """A bug's name, or a layout, as the ids of tests have it."""
    return value.__name__ if callable(value) else str(value)


EP4 = Layout(4, ep=4, dp_replicate=1, micro=4)
REPLICATED = Layout(4, ep=2, dp_replicate=2, micro=4)
BUGS = [
    (averaged_over_holders, TOPK, EP4, r"gradient of embedding.weight is 0\.\d+ times"),
    (experts_times_ep, TOPK, EP4, r"gradient of blocks\.0\.moe\.experts\.w_gate_up is 4 times"),
    (replicas_counted_twice, TOPK, REPLICATED, r"global gradient norm is 1\.41421 times"),
    (each_rank_its_own_norm, TOPK, EP4, r"global gradient norm is 0\.\d+ times"),
    (experts_left_unclipped, TOPK, EP4, r"moe\.experts\.w_gate_up ends up"),
    (means_of_every_part, TOPK, EP4, "step 1: the gradient of"),
    (means_of_every_part, TOPK, ACCUMULATED[1], "step 1: the gradient of"),
    (first_experts_everywhere, TOPK, EP4, "experts.w_gate_up starts otherwise"),
    (draws_by_place, GSHARD, EP4, "MoE layer 0: other experts kept the tokens"),
    (draws_by_place, SWITCH, EP4, "MoE layer 0: other experts kept the tokens"),
]


@pytest.mark.parametrize(("plant", "case", "layout", "message"), BUGS, ids=name)
def test_the_comparison_notices_what_peers_got_wrong(
    plant: Callable[[pytest.MonkeyPatch], None],
    case: Case,
    layout: Layout,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = alone(case.config, case.text, steps=1)
    plant(monkeypatch)
    config = spread(case.config, layout)
    ranks = simulate_ranks(layout.world, lambda: on_rank(config, case.text, steps=1))
    with pytest.raises(AssertionError, match=message):
        agree(ranks, expected)


def test_the_comparison_notices_capacity_over_a_micro_batch() -> None:
    """Slots shared by all of a rank's tokens: who is dropped depends on the layout (DeepSpeed)."""
    sections = SWITCH.config.model_dump()
    sections["moe"]["group"] = "microbatch"
    config = spread(Config.model_validate(sections), EP4)
    ranks = simulate_ranks(4, lambda: on_rank(config, SWITCH.text, steps=1))
    with pytest.raises(AssertionError, match="other experts kept the tokens"):
        agree(ranks, alone(SWITCH.config, SWITCH.text, steps=1))
