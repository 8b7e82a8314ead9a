"""What is trained does not depend on the layout: many simulated ranks against one process."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, get_args

import parity
import pytest
import torch
from layouts import CASES, CLIP_NORM, EXPERTS, GATES, Case, Layout, Text, pick, rotated, spread
from parity import agree, alone, on_rank
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from moetrain import objective, optim, parallel, step
from moetrain.config import Config
from moetrain.engines import torch as engines
from moetrain.engines.torch import TorchEngine
from moetrain.moe import OUTCOMES, Draws, Gate, MoE
from moetrain.moe.router import RouterName
from moetrain.objective import Counts, Sums
from moetrain.testing import simulate_ranks

ACCUMULATED = (Layout(1, 1, 1, micro=1), Layout(1, 1, 1, micro=4), Layout(1, 1, 1, micro=8))
FEW_RANKS = (
    Layout(2, ep=2, dp_replicate=1, micro=2),
    Layout(4, ep=4, dp_replicate=1, micro=4),
    Layout(4, ep=2, dp_replicate=2, micro=2),
    Layout(4, ep=2, dp_replicate=1, micro=2),
    Layout(4, ep=1, dp_replicate=1, micro=4),
)
MANY_RANKS = (
    Layout(8, ep=8, dp_replicate=1, micro=2),
    Layout(16, ep=16, dp_replicate=1, micro=1),
    Layout(16, ep=4, dp_replicate=2, micro=1),
)
LAYOUTS = (*FEW_RANKS, ACCUMULATED[1], MANY_RANKS[0])
SWITCH, SIGMOID, LIMITED = (pick(name, dropless=False) for name in ("switch", "sigmoid", "limited"))
GSHARD, TOPK, NOISY = (pick(name, dropless=False) for name in ("gshard", "topk", "noisy_topk"))
TOPK_DROPLESS, HIERARCHICAL = (pick(name, dropless=True) for name in ("topk", "hierarchical"))
CHOSEN_BY_EXPERTS = pick("expert_choice", balance_scope="batch")


@functools.cache
def reference(case: Case) -> parity.Outcome:
    return alone(case.config, case.text)


def compare(case: Case, layout: Layout, text: Text | None = None, **options: Any) -> list[Any]:
    """Train both ways and compare; returns what each rank has."""
    config = spread(case.config, layout)
    ranks = simulate_ranks(layout.world, lambda: on_rank(config, text or case.text, **options))
    whole = alone(case.config, text or case.text, **options) if text or options else reference(case)
    agree(ranks, whole)
    return ranks


# ---- the reference -------------------------------------------------------------------------------


def test_cases_hold_every_pair_of_settings() -> None:
    """Where two go together: with every slot taken there is no order of who gets one."""
    fields = [field.name for field in dataclasses.fields(Case)]
    for one, other in itertools.combinations(fields[1:], 2):
        values = [{getattr(case, field) for case in CASES} for field in (one, other)]
        found = {(getattr(case, one), getattr(case, other)) for case in CASES}
        wanted = set(itertools.product(*values))
        if (one, other) == ("dropless", "drop_policy"):
            wanted = {pair for pair in wanted if pair[0] is False or pair[1] == "position"}
        assert found == wanted, (one, other)
    for field in ("dropless", "balance_scope", "documents", "every", "tied", "qk_norm", "group"):
        for name in GATES.keys() - {"expert_choice"}:
            found = {getattr(case, field) for case in CASES if case.gate == name}
            assert len(found) == 2, (name, field)
    assert {case.config.moe.router for case in CASES} == set(get_args(RouterName))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_clips_and_drops(case: Case) -> None:
    """Otherwise agreeing with it would prove little."""
    can_drop = not case.dropless and case.gate != "expert_choice"
    for taken in reference(case).steps:
        assert taken.grad_norm > 2 * CLIP_NORM
        for book in taken.means.ledgers:
            outcome = dict(zip(OUTCOMES, book.outcome_EKO.sum((0, 1)).tolist(), strict=True))
            assert (outcome["dropped"] > 0) == can_drop
            assert (outcome["spilled"] > 0) == (case.drop_policy == "spill")
            assert (outcome["not_sampled"] > 0) == (case.gate == "gshard")
            assert outcome["kept"] > 0


@pytest.mark.parametrize("case", [SIGMOID, LIMITED], ids=str)
def test_the_bias_moves_and_changes_who_is_chosen(case: Case) -> None:
    outcome = reference(case)
    for number, taken in enumerate(outcome.steps, 1):
        for bias_E in taken.buffers.values():
            assert bias_E.abs().max() == pytest.approx(0.05 * number, rel=1e-12)
            assert bias_E.unique().numel() > 1
    sections = case.config.model_dump()
    sections["moe"]["bias_update_rate"] = 0.0
    still = alone(Config.model_validate(sections), case.text)
    assert not any(bias_E.any() for bias_E in still.steps[-1].buffers.values())
    assert not torch.equal(outcome.fates[0], still.fates[0])


# ---- any layout ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "layout"), rotated(CASES, LAYOUTS))
def test_every_layout_equals_one_process(case: Case, layout: Layout) -> None:
    """Dropped and spilled tokens, losses, every gradient, the norm, biases, and the weights after
    two steps."""
    compare(case, layout)


IN_PARTS = (SWITCH, SIGMOID, pick("hierarchical", dropless=False))


@pytest.mark.parametrize(("case", "layout"), rotated(IN_PARTS, ACCUMULATED))
def test_accumulation_equals_the_whole_batch(case: Case, layout: Layout) -> None:
    compare(case, layout)


MANY = ((LIMITED, MANY_RANKS[1]), (HIERARCHICAL, MANY_RANKS[2]))


@pytest.mark.parametrize(("case", "layout"), MANY, ids=str)
def test_many_ranks_equal_one_process(case: Case, layout: Layout) -> None:
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
    (taken,) = ranks[0].steps
    assert taken.means.loss == 0
    assert (taken.grad_norm > 0) == (coefficient > 0)
    for name, grad in taken.grads.items():
        assert grad.isfinite().all(), name


TIED = (SWITCH, GSHARD, TOPK_DROPLESS, LIMITED, HIERARCHICAL, CHOSEN_BY_EXPERTS)


@pytest.mark.parametrize(("case", "layout"), rotated(TIED, (FEW_RANKS[1], FEW_RANKS[3])))
def test_ties_go_to_the_first_experts(case: Case, layout: Layout) -> None:
    """A router of zeros makes all logits equal, before jitter and after. Of groups the first two
    are chosen, and of each as many experts; experts that choose take the first tokens."""
    choices = torch.arange(case.config.moe.top_k)
    if case.gate == "hierarchical":
        choices = torch.tensor([0, 1, 4, 5])
    if case.gate == "expert_choice":
        choices = torch.arange(EXPERTS)
    for rank in compare(case, layout, change=torch.zeros_like, steps=1):
        for table in rank.fates:
            firsts = table[:, 1:] == choices
            if case.drop_policy != "spill":
                assert (firsts | (table[:, 1:] == -1)).all()
            assert firsts[0, :1].all()


# ---- evaluation ----------------------------------------------------------------------------------


EVALUATED = (*ACCUMULATED, *FEW_RANKS[:3], MANY_RANKS[0])
EACH_GATE = [next(case for case in CASES[::-1] if case.gate == name) for name in GATES]


@pytest.mark.parametrize(("case", "layout"), rotated(EACH_GATE, EVALUATED))
def test_evaluation_depends_on_no_layout(case: Case, layout: Layout) -> None:
    """Of 11 sequences some ranks get fewer than others, or none; nothing is drawn at random."""
    text = Text(case.documents, sequences=11)
    expected = parity.evaluated_alone(case.config, text, 11)
    for book in expected.ledgers:
        assert not book.outcome_EKO[..., OUTCOMES.index("not_sampled")].any()
    config = spread(case.config, layout)
    for means in simulate_ranks(layout.world, parity.evaluated, config, text, 64):
        parity.agree_on_means(means, expected, str(layout))
    (again,) = simulate_ranks(1, parity.evaluated, spread(case.config, ACCUMULATED[0]), text, 64)
    parity.agree_on_means(again, expected, "again")


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
    patch.setattr(engines, "global_grad_norm", lambda weights, _, loss: norm(weights, 1, loss))


def each_rank_its_own_norm(patch: pytest.MonkeyPatch) -> None:
    """Every rank clips by what it holds (NeMo Automodel #3816)."""

    def wrong(weights: Iterable[Any], _: int, loss: Tensor) -> tuple[float, float]:
        grads = [weight.grad for weight in weights]
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
        return torch.nn.utils.get_total_norm(local).item(), loss.item()

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

    def wrong(
        local: Sums, counts: Counts, balance_coef: float, z_coef: float, whole: Any
    ) -> Tensor:
        return right(local, counts, 4 * balance_coef, 4 * z_coef, whole)

    patch.setattr(step, "objective", wrong)


def first_experts_everywhere(patch: pytest.MonkeyPatch) -> None:
    """Every rank starts from the experts of the first (DeepSpeed #6589, MegaBlocks #160)."""
    right = parallel.initial_value

    def wrong(*others: Any) -> Tensor:
        return right(*others[:-1], experts=range(len(others[-1])))

    patch.setattr(parallel, "initial_value", wrong)


def draws_by_place(patch: pytest.MonkeyPatch) -> None:
    """Random draws that know a token's place in the micro-batch only."""
    patch.setattr(step, "Draws", lambda key, ids: Draws(key, torch.arange(len(ids))))


def balance_of_own_tokens(patch: pytest.MonkeyPatch) -> None:
    """Batch balance that sums no rank's counts but its own."""
    right = step.batch_balance

    def wrong(gate: Gate, parts: Any, mesh: Any) -> Any:
        return right(gate, parts, Alone(mesh))

    patch.setattr(step, "batch_balance", wrong)


def balance_of_every_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """Batch balance that forgets the micro-batches still to come."""
    patch.setattr(step, "_survey", lambda *_: None)


def bias_of_own_tokens(patch: pytest.MonkeyPatch) -> None:
    """A bias that follows the load of a rank's own tokens."""
    right = step.loads
    patch.setattr(step, "loads", lambda parts, mesh: right(parts, Alone(mesh)))


def bias_after_drops(patch: pytest.MonkeyPatch) -> None:
    """A bias that follows the rows which experts got (Megatron-Core with padding)."""

    def wrong(parts: list[Sums], mesh: Any) -> Tensor:
        rows = [torch.stack([book.row_E for book in part.ledgers]) for part in parts]
        return mesh.sum(torch.stack(rows).sum(0))

    patch.setattr(step, "loads", wrong)


class Alone:
    """A mesh whose sums are those of one rank."""

    def __init__(self, mesh: Any):
        self.mesh = mesh

    def sum(self, tensor: Tensor) -> Tensor:
        return tensor.detach().clone()


def name(value: object) -> str:
    """A bug's name, or a layout, as the ids of tests have it."""
    return value.__name__ if callable(value) else str(value)


EP4 = Layout(4, ep=4, dp_replicate=1, micro=4)
REPLICATED = Layout(4, ep=2, dp_replicate=2, micro=4)
BUGS = [
    (averaged_over_holders, TOPK, EP4, r"gradient of embedding.weight is 0\.\d+ times"),
    (experts_times_ep, TOPK, EP4, r"gradient of blocks\.0\.moe\.experts\.w_gate_up is 4 times"),
    (replicas_counted_twice, TOPK, REPLICATED, r"global gradient norm is 1\.3\d+ times"),
    (each_rank_its_own_norm, TOPK, EP4, r"global gradient norm is 0\.\d+ times"),
    (experts_left_unclipped, TOPK, EP4, r"moe\.experts\.w_gate_up ends up"),
    (means_of_every_part, TOPK, EP4, "step 1: the gradient of"),
    (means_of_every_part, TOPK, ACCUMULATED[1], "step 1: the gradient of"),
    (first_experts_everywhere, TOPK, EP4, "experts.w_gate_up starts otherwise"),
    (draws_by_place, GSHARD, EP4, "MoE layer 0: the tokens went to other experts"),
    (draws_by_place, NOISY, EP4, "MoE layer 0: the tokens went to other experts"),
    (balance_of_own_tokens, SIGMOID, EP4, "balance_loss is"),
    (balance_of_every_micro_batch, SIGMOID, ACCUMULATED[1], "balance_loss is"),
    (bias_of_own_tokens, SIGMOID, EP4, r"moe\.router\.bias ends up otherwise"),
    (bias_after_drops, LIMITED, EP4, r"moe\.router\.bias ends up otherwise"),
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
    with pytest.raises(AssertionError, match="the tokens went to other experts"):
        agree(ranks, alone(SWITCH.config, SWITCH.text, steps=1))
