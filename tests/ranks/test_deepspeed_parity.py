"""What DeepSpeed trains is what one process trains, where test_matrix.py does not look.

DeepSpeed computes in fp32 here, the reference in fp64.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import parity
import pytest
import torch
from deepspeed_layouts import DATA2_EP2, DENSE, EP2, EP4, ROUNDING, Variant, under
from layouts import BATCH, LENGTH, STEPS, Case, Text, pick
from parity import agree, alone, build_run, on_rank, weights_of
from torch import Tensor

from moetrain.config import Config
from moetrain.engines import deepspeed as engine_module
from moetrain.moe import MoE
from moetrain.objective import reduce
from moetrain.spikes import Window
from moetrain.step import Position, train_step
from moetrain.testing import RankPool

TOPK, TOPK_DROPLESS = (pick("topk", dropless=dropless) for dropless in (False, True))
SIGMOID, GSHARD = pick("sigmoid", dropless=True), pick("gshard", dropless=True)
RENORMALIZED = pick("renormalized", dropless=False)
"""Without drops by gate, in which equal tokens tie: fp32 and fp64 do not round them alike."""
VARIANTS = [
    Variant(EP2._replace(micro=2), 1, SIGMOID),
    Variant(EP2._replace(micro=4), 2, GSHARD),
    Variant(DENSE, 0, TOPK),
    Variant(DENSE, 2, SIGMOID),
]


@functools.cache
def reference(case: Case) -> parity.Outcome:
    return alone(case.config, case.text)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_training_equals_one_process(ranks2: RankPool, variant: Variant) -> None:
    """Where tokens went, losses, every gradient, the norm, biases, and the weights."""
    ranks = ranks2.run(on_rank, variant.config(), variant.case.text)
    agree(ranks, reference(variant.case), ROUNDING)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("part", ["experts", "router"])
def test_frozen_weights_stay_and_the_others_are_trained(
    ranks2: RankPool, part: Literal["experts", "router"], stage: int
) -> None:
    def frozen(config: Config) -> Config:
        train = config.train.model_copy(update={"freeze": (part,)})
        return config.model_copy(update={"train": train})

    ranks = ranks2.run(on_rank, frozen(Variant(EP2, stage, TOPK).config()), TOPK.text)
    agree(ranks, alone(frozen(TOPK.config), TOPK.text), ROUNDING)


# ---- nothing to learn from, nobody to learn ------------------------------------------------------


@pytest.mark.parametrize(("case", "stage"), [(TOPK, 1), (TOPK_DROPLESS, 2)])
@pytest.mark.parametrize("first", [12, 16])
def test_ranks_of_padding_alone(ranks4: RankPool, case: Case, stage: int, first: int) -> None:
    """3 or all 4 ranks have no token. DeepSpeed's layers hang here (#4808, #5066, #7461)."""
    text = Text(case.documents, empty=frozenset(range(first)))
    ranks = ranks4.run(on_rank, Variant(EP4, stage, case).config(), text, None, 1)
    agree(ranks, alone(case.config, text, steps=1), ROUNDING)


@pytest.mark.parametrize(("case", "stage"), [(TOPK, 2), (TOPK_DROPLESS, 0)])
def test_ranks_whose_experts_nobody_chooses(ranks4: RankPool, case: Case, stage: int) -> None:
    """No token reaches ranks 2 and 3: no hang, and gradient zero, not none."""
    options = case.text, parity.opposite_pairs, 1
    ranks = ranks4.run(on_rank, Variant(EP4, stage, case).config(), *options)
    agree(ranks, alone(case.config, *options), ROUNDING)
    for name, grad in ranks[0].steps[0].grads.items():
        if ".experts." in name:
            assert grad[:6].any(), name
            assert (grad[6:] == 0).all(), name


# ---- steps that are skipped ----------------------------------------------------------------------


def spoiled(config: Config, text: Text, spoil: str) -> tuple[list[bool], bool, Any]:
    """Three steps on one rank of several, the second of them tried before with a fault on rank 1:
    which were skipped, whether weights and moments survived it bit by bit, and the weights in the
    end."""
    run = build_run(config, text)
    engine: Any = run.engine
    skipped, survived = [], True
    usual = Window([1e3, 2e3] * 16, [1e3, 2e3] * 16)
    for number in (0, 1, 1, 2):
        before = held(engine)
        is_bad = number == 1 and len(skipped) == 1
        undo = SPOILS[spoil](engine) if is_bad and run.mesh.rank == 1 else lambda: None
        result = train_step(run, Position(number, number * BATCH, 0, window=usual))
        undo()
        skipped.append(result.outcome.was_skipped)
        if is_bad:
            survived = all(
                torch.equal(now, old) for now, old in zip(held(engine), before, strict=True)
            )
    return skipped, survived, weights_of(engine.engine)


def held(engine: Any) -> list[Tensor]:
    """Copies of all that a rank has of weights and moments."""
    inner = engine.engine
    moments = [t for state in inner.optimizer.state.values() for t in state.values()]
    return [t.detach().clone() for t in (*inner.weights.values(), *moments)]


def a_loss(engine: Any, factor: float) -> Callable[[], None]:
    """In the last micro-batch."""
    backward = engine.backward

    def wrong(loss: Tensor, last: bool) -> None:
        backward(loss * factor if last else loss, last)

    engine.backward = wrong
    return lambda: delattr(engine, "backward")


def a_gradient_of_inf(engine: Any) -> Callable[[], None]:
    """In one element of an expert, under a finite loss."""
    weight = next(w for name, w in engine.engine.weights.items() if "w_down" in name)
    wrong = torch.zeros_like(weight)
    wrong.view(-1)[-1] = math.inf
    return weight.register_hook(lambda grad: grad + wrong).remove


SPOILS = {
    "loss": functools.partial(a_loss, factor=math.nan),
    "gradient": a_gradient_of_inf,
    "spike": functools.partial(a_loss, factor=1e6),
}
FAULTS = [("loss", 0), ("gradient", 1), ("loss", 2), ("gradient", 2)]


@pytest.mark.parametrize(("spoil", "stage"), [*FAULTS, ("spike", 0), ("spike", 1), ("spike", 2)])
def test_a_bad_step_of_one_rank_is_skipped_by_all(ranks4: RankPool, stage: int, spoil: str) -> None:
    """And leaves nothing behind: the steps after it are those of a run that never had it."""
    expected = alone(TOPK.config, TOPK.text, steps=3)
    config = Variant(DATA2_EP2._replace(micro=2), stage, TOPK).config()
    train = config.train.model_copy(update={"spike_response": "skip"})
    config = config.model_copy(update={"train": train})
    for skipped, survived, weights in ranks4.run(spoiled, config, TOPK.text, spoil):
        assert skipped == [False, True, False, False]
        assert survived
        for name, value in expected.weights.items():
            parity.close(weights[name], value, f"{name} ends up", ROUNDING)


# ---- bf16 ----------------------------------------------------------------------------------------


def in_bf16(config: Config, text: Text) -> dict[str, Any]:
    """One step and an evaluation on one rank, and the dtypes on the way."""
    run = build_run(config, text)
    engine: Any = run.engine
    seen: dict[str, set[torch.dtype]] = {"logits": set(), "weights": set()}
    for module in engine.model.modules():
        if isinstance(module, MoE):
            module.router.register_forward_hook(
                lambda _, x, record: seen["logits"].update(t.dtype for t in record[1:5])
            )
    with parity.dtypes_of_rows() as seen["rows"]:
        result = train_step(run, Position())
    seen["weights"].update(weight.dtype for weight in engine.engine.weights.values())
    seen["weights"].update(grad.dtype for grad in engine.grads.values())
    seen["weights"].update(bias.dtype for bias in engine.engine.buffers.values())
    assert all(isinstance(w, torch.nn.Parameter) for w in engine.model.parameters())
    loss = reduce(result.parts, result.counts, run.mesh).loss
    return {**seen, "loss": loss, "grads": engine.grads, "norm": result.outcome.grad_norm}


@pytest.mark.parametrize(
    ("stage", "case", "recompute"),
    [(0, RENORMALIZED, "none"), (1, SIGMOID, "full"), (2, GSHARD, "selective")],
)
def test_bf16_is_that_of_the_torch_engine(
    ranks2: RankPool, stage: int, case: Case, recompute: str
) -> None:
    """bf16 in the experts, fp32 in routers, weights and gradients, sums in the same order: these
    models have no shared experts, whose gradients the two would add up in another."""
    options = {"precision": "bf16", "activation_checkpointing": recompute}
    variant = Variant(EP2._replace(micro=4), stage, case)
    ours = ranks2.run(in_bf16, variant.config(**options), case.text)[0]
    config = under(case.config, variant.layout, "torch", precision="bf16")
    theirs = ranks2.run(in_bf16, config, case.text)[0]
    assert ours["rows"] == {torch.bfloat16}
    assert ours["logits"] == ours["weights"] == {torch.float32}
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=ROUNDING)
    parity.close(ours["norm"], theirs["norm"], "the global gradient norm is", ROUNDING)
    for name, grad in theirs["grads"].items():
        parity.close(ours["grads"][name], grad, f"the gradient of {name} is", ROUNDING)


# ---- what a user's JSON may change ---------------------------------------------------------------


def final_weights(config: Config, text: Text) -> Any:
    """What a rank has after all steps. (DeepSpeed's own view of gradients is wrong with round-robin
    partitions, so it is not asked.)"""
    run = build_run(config, text)
    watched: Any = run.engine
    run = dataclasses.replace(run, engine=watched.engine)
    for step in range(STEPS):
        train_step(run, Position(step, step * BATCH, step * BATCH * LENGTH))
    return weights_of(watched.engine)


SETTINGS: list[tuple[int, dict[str, Any]]] = [
    (0, {"zero_optimization": {"reduce_bucket_size": 500}}),
    (1, {"zero_optimization": {"reduce_bucket_size": 500, "round_robin_gradients": True}}),
    (1, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
    (2, {"zero_optimization": {"overlap_comm": True, "allgather_bucket_size": 500}}),
    (2, {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}),
]


@pytest.mark.parametrize(("stage", "given"), SETTINGS)
def test_settings_that_pass_change_no_number(
    ranks4: RankPool, tmp_path: Path, stage: int, given: dict[str, Any]
) -> None:
    """Buckets, overlap and offload say how, not what."""
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(given))
    config = Variant(DATA2_EP2._replace(micro=2), stage, TOPK).config(deepspeed_config=path)
    for weights in ranks4.run(final_weights, config, TOPK.text):
        for name, value in reference(TOPK).weights.items():
            parity.close(weights[name], value, f"{name} ends up", ROUNDING)


# ---- what DeepSpeed got wrong, planted -----------------------------------------------------------


def expert_gradients_by_their_holders(patch: pytest.MonkeyPatch) -> None:
    """Experts averaged over the ranks that hold them: ep times too large (#5618, #6545)."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    right = DeepSpeedEngine.allreduce_bucket
    patch.setattr(
        DeepSpeedEngine,
        "allreduce_bucket",
        lambda engine, bucket, group, _=None: right(engine, bucket, group),
    )


def shares_counted_by_every_holder(patch: pytest.MonkeyPatch) -> None:
    """Dense gradients enter the norm once a rank."""
    right = engine_module.global_norm
    patch.setattr(
        engine_module,
        "global_norm",
        lambda grads, loss: right([(tensors, 1) for tensors, _ in grads], loss),
    )


def each_rank_its_own_norm(patch: pytest.MonkeyPatch) -> None:
    """Every rank clips by its shares of the gradient (NeMo Automodel #3816)."""

    def wrong(grads: list[tuple[list[Tensor], int]], loss: Tensor) -> tuple[float, float]:
        tensors = [tensor for tensors, _ in grads for tensor in tensors]
        return torch.nn.utils.get_total_norm(tensors).item(), loss.item()

    patch.setattr(engine_module, "global_norm", wrong)


def the_mean_of_the_ranks(patch: pytest.MonkeyPatch) -> None:
    """Its mean where a sum is due."""
    right = engine_module.DeepSpeedEngine.backward
    patch.setattr(
        engine_module.DeepSpeedEngine,
        "backward",
        lambda engine, loss, last: right(engine, loss / engine.mesh.world, last),
    )


def with_bug(plant: str, config: Config, text: Text) -> parity.Outcome:
    """One step of one rank with a bug planted."""
    with pytest.MonkeyPatch.context() as patch:
        globals()[plant](patch)
        return on_rank(config, text, steps=1)


BUGS = [
    (expert_gradients_by_their_holders, 0, r"gradient of \S+\.experts\.w_gate_up is 2 times"),
    (shares_counted_by_every_holder, 0, r"the global gradient norm is \d\.\d+ times"),
    (each_rank_its_own_norm, 1, r"the global gradient norm is 0\.\d+ times"),
    (the_mean_of_the_ranks, 2, r"the gradient of embedding.weight is 0\.25 times"),
]


@pytest.mark.parametrize(("plant", "stage", "message"), BUGS)
def test_the_comparison_notices_what_deepspeed_got_wrong(
    ranks4: RankPool, plant: Callable[..., None], stage: int, message: str
) -> None:
    config = Variant(DATA2_EP2, stage, TOPK).config()
    ranks = ranks4.run(with_bug, plant.__name__, config, TOPK.text)
    with pytest.raises(AssertionError, match=message):
        agree(ranks, alone(TOPK.config, TOPK.text, steps=1), ROUNDING)
