"""The same steps twice: by one process that knows nothing of ranks, and by the ranks of a layout.

`alone` is the reference: a plain model in fp64, the whole global batch in one forward and backward
pass, the objective, the clipping and the routers' biases written out, unfused AdamW. `on_rank` is
one rank of the real thing: mesh, engine and training step as a run has them. `agree` compares
everything that comes of the two.

Shape suffixes: B sequences, L tokens of a sequence, T = B·L, K choices, E experts, A groups of
experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from layouts import BATCH, CLIP_NORM, IGNORE, LENGTH, STEPS, VOCAB, Text
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from moetrain import engines
from moetrain.build import build_model, gate
from moetrain.config import Config, TrainConfig
from moetrain.data import Batch
from moetrain.evaluate import evaluate
from moetrain.mesh import Mesh
from moetrain.model import Output, Transformer, initial_value
from moetrain.moe import Draws, Gate, LayerOutput, Ledger, MoE, Plan, Router, Routing, dispatch
from moetrain.moe.experts import Feed
from moetrain.moe.keyed import step_key
from moetrain.objective import LayerMeans, Means, reduce
from moetrain.optim import StepOutcome
from moetrain.spikes import Limits
from moetrain.step import Position, Run, train_step

CPU = torch.device("cpu")

# ---- what came of it -----------------------------------------------------------------------------


Tensors = Mapping[str, Tensor]


class Step(NamedTuple):
    """One optimizer step; norm and gradients are those before clipping."""

    means: Means
    grad_norm: float
    grads: Tensors
    buffers: Tensors
    """After the step: the routers' biases."""


class Outcome(NamedTuple):
    """A whole training, in logical tensors."""

    initial: Tensors
    steps: list[Step]
    weights: Tensors
    fates: list[Tensor]
    """One table per MoE layer: a row per valid token, with its global id and the expert that it
    went to, choice by choice, -1 for none."""


def _expert_of_row(plan: Plan) -> Tensor:
    """The expert of every row of the buffer, and -1 for the row past the end."""
    rows = plan.count_E if plan.rows_per_expert is None else plan.rows_per_expert
    experts = torch.arange(len(plan.count_E), device=plan.count_E.device).repeat_interleave(rows)
    return F.pad(experts, (0, plan.source_R.numel() + 1 - len(experts)), value=-1)


class Serving:
    """A text that notes the batches it hands out."""

    def __init__(self, text: Text):
        self.text = text
        self.batches: list[Batch] = []

    def __len__(self) -> int:
        return len(self.text)

    def batch(self, indices: Sequence[int]) -> Batch:
        """See `Text`."""
        self.batches.append(self.text.batch(indices))
        return self.batches[-1]


def note(model: nn.Module) -> list[list[Tensor]]:
    """Lists to which every MoE layer adds where its tokens went, call by call."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    notes: list[list[Tensor]] = [[] for _ in layers]
    for layer, went in zip(layers, notes, strict=True):
        layer.register_forward_hook(partial(_note, went))
    return notes


def _note(went: list[Tensor], _layer: MoE, _inputs: Any, output: LayerOutput) -> None:
    """A pass without a backward pass to come is none that trains; one inside of it recomputes."""
    if torch.is_grad_enabled() and torch._C._current_graph_task_id() == -1:
        plan = output.decisions.plan
        went.append(_expert_of_row(plan).take(plan.row_TK).cpu())


def fates(notes: list[list[Tensor]], batches: list[Batch]) -> list[Tensor]:
    """See `Outcome.fates`."""
    valid = torch.cat([batch.valid_BL.flatten() for batch in batches])
    ids = torch.cat([batch.token_id_BL.flatten() for batch in batches])
    return [torch.cat([ids[:, None], torch.cat(went)], dim=1)[valid] for went in notes]


# ---- one process ---------------------------------------------------------------------------------


Change = Callable[[Tensor], Tensor]
"""A new value for every router's weight, from the old one."""


def opposite_pairs(weight_ED: Tensor) -> Tensor:
    """Of experts 0 and 1, 2 and 3, 4 and 5 one always has a positive logit; the others have 0, so
    up to three choices never reach them."""
    pairs_D = weight_ED[:6:2]
    return F.pad(torch.stack([pairs_D, -pairs_D], 1).flatten(0, 1), (0, 0, 0, len(weight_ED) - 6))


def plain_model(config: Config, change: Change | None = None) -> Transformer:
    """The model on the CPU in fp64, with all experts."""
    model = build_model(config, VOCAB).double().to_empty(device="cpu")
    experts = range(config.moe.experts)
    for buffer in model.buffers():
        buffer.zero_()
    for prefix, module in model.named_modules():
        for name, weight in module.named_parameters(prefix, recurse=False):
            shape, layers = weight.shape, config.model.layers
            value = initial_value(module, name, shape, config.seed, layers, experts)
            weight.data.copy_(change(value) if change and "router" in name else value)
    return model


def alone(config: Config, text: Text, change: Change | None = None, steps: int = STEPS) -> Outcome:
    """Train without ranks: no mesh, no sharding, no micro-batches."""
    model = plain_model(config, change)
    weights, notes, serving = dict(model.named_parameters()), note(model), Serving(text)
    initial, results, records = _full(weights), [], routings(model)
    optimizer = _plain_adamw(config.train, weights)
    for step in range(1, steps + 1):
        records.clear()
        batch = serving.batch(range((step - 1) * BATCH, step * BATCH))
        draws = Draws(step_key(config.seed, step), batch.token_id_BL.flatten())
        output = plain_forward(model, batch, "train", draws)
        scope = config.moe.balance_scope
        losses = loss, balance_loss, z_loss = plain_losses(config, output, records, batch, scope)
        moe = config.moe
        optimizer.zero_grad()
        (loss + moe.balance_coef * balance_loss + moe.z_loss_coef * z_loss).backward()
        grads = _grads(weights)
        norm = sum(grad.square().sum().item() for grad in grads.values()) ** 0.5
        if norm > CLIP_NORM:
            for weight in weights.values():
                if weight.grad is not None:
                    weight.grad *= CLIP_NORM / norm
        optimizer.step()
        plain_rebalance(model, records, moe.bias_update_rate)
        means = plain_means(losses, output, records, batch)
        results.append(Step(means, norm, grads, _full(dict(model.named_buffers()))))
    return Outcome(initial, results, _full(weights), fates(notes, serving.batches))


def routings(model: nn.Module) -> list[Routing]:
    """A list to which every router adds its record, layer by layer."""
    records: list[Routing] = []
    for module in model.modules():
        if isinstance(module, Router):
            module.register_forward_hook(lambda _, inputs, record: records.append(record))
    return records


def plain_forward(model: Transformer, batch: Batch, mode: Any, draws: Draws | None) -> Output:
    """The whole logits rather than the loss."""
    return model(
        batch.tokens_BL,
        valid_BL=batch.valid_BL,
        document_BL=batch.document_BL,
        mode=mode,
        draws=draws,
    )


def plain_losses(
    config: Config, output: Output, records: list[Routing], batch: Batch, scope: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, balance and z-loss by their definition; a mean over nothing is 0."""
    assert output.logits_BLV is not None
    log_prob = output.logits_BLV.log_softmax(-1).flatten(0, 1)
    targets = batch.targets_BL.flatten().tolist()
    losses = [-log_prob[t, target] for t, target in enumerate(targets) if target != IGNORE]
    nothing = 0 * log_prob.sum()
    sets = _sets_of_tokens(config, batch.valid_BL.flatten().tolist(), scope)
    tokens = [token for members in sets for token in members]
    balance = [plain_balance(gate(config.moe), r, members) for r in records for members in sets]
    z = [(r.logits_TE[tokens].exp().sum(1).log() ** 2).mean() for r in records if tokens]
    return (
        torch.stack(losses).mean() if losses else nothing,
        torch.stack(balance).mean() if balance else nothing,
        torch.stack(z).mean() if z else nothing,
    )


def _sets_of_tokens(config: Config, valid: list[bool], scope: str) -> list[list[int]]:
    """The valid tokens of every set that is to be balanced, if it has any."""
    group = LENGTH if config.moe.group == "sequence" else config.moe.group
    assert isinstance(group, int)
    size = group if scope == "group" else len(valid)
    sets = [range(i, i + size) for i in range(0, len(valid), size)]
    return [members for s in sets if (members := [t for t in s if valid[t]])]


def plain_balance(gate: Gate, record: Routing, tokens: list[int]) -> Tensor:
    """The balance loss of a set of tokens: 1 at perfect balance."""
    prob_TE = record.prob_TE[tokens]
    expert_TK = record.expert_TK[tokens, : 1 if gate.name == "gshard" else None]
    num_experts = prob_TE.shape[1]
    asked_E = torch.stack([(expert_TK == e).sum() for e in range(num_experts)]).double()
    if gate.name == "noisy_topk":
        assert record.load_TE is not None
        gate_TK = record.gate_TK[tokens]
        importance = [gate_TK[expert_TK == e].sum() for e in range(num_experts)]
        both = torch.stack(importance), record.load_TE[tokens].sum(0)
        return 1 + sum((x - x.mean()).square().mean() / x.mean() ** 2 for x in both)
    if gate.name == "hierarchical":
        return _plain_two_levels(gate.groups, expert_TK, asked_E, prob_TE)
    return num_experts * (asked_E / asked_E.sum() * prob_TE.mean(0)).sum()


def _plain_two_levels(
    num_groups: int, expert_TK: Tensor, asked_E: Tensor, prob_TE: Tensor
) -> Tensor:
    """The mean of the loss over groups and of its mean inside the groups that somebody chose."""
    size = len(asked_E) // num_groups
    outer, inner = torch.zeros((), dtype=torch.float64), []
    for a in range(num_groups):
        members = slice(a * size, (a + 1) * size)
        asked_e, prob_Te = asked_E[members], prob_TE[:, members]
        outer = outer + num_groups * asked_e.sum() / asked_E.sum() * prob_Te.sum(1).mean()
        chose_T = (expert_TK // size == a).any(1)
        if chose_T.any():
            within_Te = prob_Te[chose_T] / prob_Te[chose_T].sum(1, keepdim=True)
            inner.append(size * (asked_e / asked_e.sum() * within_Te.mean(0)).sum())
    return (outer + torch.stack(inner).mean()) / 2


@torch.no_grad()
def plain_rebalance(model: nn.Module, records: list[Routing], rate: float) -> None:
    """Every bias a step towards the experts that were chosen less often than the mean."""
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for router, record in zip(routers, records, strict=True):
        if router.gate.name == "sigmoid":
            chosen = record.expert_TK[record.valid_T].flatten().tolist()
            mean = len(chosen) / router.num_experts
            for expert in range(router.num_experts):
                load = chosen.count(expert)
                router.bias[expert] += rate * ((load < mean) - (load > mean))


def plain_means(
    losses: tuple[Tensor, Tensor, Tensor], output: Output, records: list[Routing], batch: Batch
) -> Means:
    """The same as the numbers that a step reports."""
    layers = []
    for stats, record in zip(output.layers, records, strict=True):
        outcome_O = stats.ledger.outcome_EKO.sum((0, 1))
        lost = stats.gate_mass.dropped.item()
        whole = record.gate_TK[record.sampled_TK & record.valid_T[:, None]].sum().item()
        share = lost / whole if whole else 0.0
        layers.append(LayerMeans(stats.ledger, share, (tuple(outcome_O.tolist()),)))
    loss, balance_loss, z_loss = (value.item() for value in losses)
    targets = [target for target in batch.targets_BL.flatten().tolist() if target != IGNORE]
    return Means(loss, balance_loss, z_loss, tuple(layers), len(targets))


def _plain_adamw(train: TrainConfig, weights: Tensors) -> torch.optim.AdamW:
    matrices = [weight for weight in weights.values() if weight.ndim >= 2]
    vectors = [weight for weight in weights.values() if weight.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.adam_eps,
        weight_decay=train.weight_decay,
        foreach=False,
        fused=False,
    )


def _grads(weights: Tensors) -> Tensors:
    """Logical gradients, in memory of their own."""
    for name, weight in weights.items():
        assert (weight.grad is not None) == weight.requires_grad, f"{name}: {weight.grad}"
    return _full({name: w.grad for name, w in weights.items() if w.grad is not None})


def _full(tensors: Tensors) -> Tensors:
    """Logical copies of tensors, sharded or not, on the CPU."""
    return {
        name: _copy(t.full_tensor() if isinstance(t, DTensor) else t) for name, t in tensors.items()
    }


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


# ---- one rank of many ----------------------------------------------------------------------------


class Watched:
    """An engine that notes the gradients before each step, in front of the real one."""

    def __init__(self, engine: Any):
        self.engine, self.model = engine, engine.model
        self.grads: Tensors = {}

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        self.engine.backward(loss, last)

    def step(self, lr: float, limits: Limits) -> StepOutcome:
        """See `Engine`."""
        self.grads = grads_of(self.engine)
        return self.engine.step(lr, limits)

    def state(self) -> Tensors:
        """See `Engine`."""
        return self.engine.state()


def evaluated(config: Config, text: Text, sequences: int) -> Means:
    """Evaluate as one rank of the process group does."""
    run = build_run(config, text)
    return evaluate(run.engine.model, run.held_out, sequences, config, run.mesh)


def evaluated_alone(config: Config, text: Text, sequences: int) -> Means:
    """Evaluate without ranks, all sequences at once."""
    batch, model = text.batch(range(sequences)), plain_model(config)
    records = routings(model)
    with torch.no_grad():
        output = plain_forward(model, batch, "eval", None)
        losses = plain_losses(config, output, records, batch, "group")
        return plain_means(losses, output, records, batch)


def build_run(
    config: Config, text: Text, change: Change | None = None, device: torch.device = CPU
) -> Run:
    """A run of this rank, with routers changed before the first step."""
    parallel = config.parallel
    mesh = Mesh(device, parallel.ep, parallel.dp_replicate, parallel.nodes_apart)
    model = build_model(config, VOCAB)
    engine: Any = engines.build(config, model, mesh)
    for name, weight in engine.weights.items():
        if change and "router" in name:
            weight.data.copy_(change(weight.detach()))
    serving: Any = Serving(text)
    # There is nothing prepared and no folder: a step reads neither.
    return Run(config, Path(), mesh, None, Watched(engine), serving, serving)  # type: ignore[arg-type]


def on_rank(
    config: Config,
    text: Text,
    change: Change | None = None,
    steps: int = STEPS,
    device: torch.device = CPU,
) -> Outcome:
    """Train as one rank of the process group does; fates are those of its own tokens."""
    run = build_run(config, text, change, device)
    watched: Any = run.engine
    notes = note(watched.model)
    initial, results = weights_of(watched.engine), []
    for step in range(steps):
        result = train_step(run, Position(step, step * BATCH, step * BATCH * LENGTH))
        means = reduce(result.parts, result.counts, run.mesh, result.batch_balance)
        buffers = _full(watched.engine.buffers)
        results.append(Step(means, result.outcome.grad_norm, watched.grads, buffers))
    serving: Any = run.samples
    final = weights_of(watched.engine)
    return Outcome(initial, results, final, fates(notes, serving.batches))


def whole(engine: Any, name: str, tensor: Tensor) -> Tensor:
    """A logical tensor of what an engine has of it. DeepSpeed's has its experts as they are."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if ".experts." in name and engine.mesh.ep > 1:
        spread = DTensor.from_local(tensor, engine.mesh.expert_parallel, [Shard(0)])
        return spread.full_tensor()
    return tensor


def weights_of(engine: Any) -> Tensors:
    """Copies of the logical weights."""
    return {n: _copy(whole(engine, n, w.detach())) for n, w in engine.weights.items()}


def grads_of(engine: Any) -> Tensors:
    """Copies of the logical gradients between backward pass and step, as the engine sums them."""
    trained = {name: weight for name, weight in engine.weights.items() if weight.requires_grad}
    if hasattr(engine, "deepspeed"):
        from deepspeed.utils import safe_get_full_grad

        grads = {name: safe_get_full_grad(weight) for name, weight in trained.items()}
    else:
        grads = {name: weight.grad for name, weight in trained.items()}
    for name, grad in grads.items():
        assert grad is not None, f"{name} has no gradient"
    return {name: _copy(whole(engine, name, grad)) for name, grad in grads.items()}


# ---- the comparison ------------------------------------------------------------------------------


def agree(ranks: list[Outcome], expected: Outcome, tolerance: float = 1e-10) -> None:
    """Every rank against the reference, step by step; the message says what differs, and how.

    The tolerance is that of fp64 unless another precision is under test.
    """
    for number, rank in enumerate(ranks):
        for name, value in expected.initial.items():
            assert torch.equal(rank.initial[name], value), f"rank {number}: {name} starts otherwise"
    for step, theirs in enumerate(expected.steps, 1):
        for layer, table in enumerate(expected.fates):
            mine = torch.cat([rank.fates[layer] for rank in ranks])
            where = f"step {step}, MoE layer {layer}"
            _same_fates(_of_step(mine, step), _of_step(table, step), where)
        for number, rank in enumerate(ranks):
            agree_on_step(rank.steps[step - 1], theirs, f"rank {number}, step {step}", tolerance)
    for number, rank in enumerate(ranks):
        for name, value in expected.weights.items():
            close(rank.weights[name], value, f"rank {number}: {name} ends up", tolerance)


def agree_on_step(mine: Step, theirs: Step, where: str, tolerance: float = 1e-10) -> None:
    """Losses, ledgers, gradients and their norm in one step, and biases after it."""
    agree_on_means(mine.means, theirs.means, where, tolerance)
    for name, grad in theirs.grads.items():
        close(mine.grads[name], grad, f"{where}: the gradient of {name} is", tolerance)
    assert mine.grads.keys() == theirs.grads.keys(), where
    close(mine.grad_norm, theirs.grad_norm, f"{where}: the global gradient norm is", tolerance)
    for name, buffer in theirs.buffers.items():
        rounded = buffer.to(mine.buffers[name].dtype)
        gap = (mine.buffers[name] - rounded).abs().max()
        limit = 0 if buffer.dtype == rounded.dtype else torch.finfo(rounded.dtype).eps
        assert gap <= limit, f"{where}: {name} ends up otherwise"


def agree_on_means(mine: Means, theirs: Means, where: str, tolerance: float = 1e-10) -> None:
    """Losses up to rounding, ledgers exactly."""
    for field in ("loss", "balance_loss", "z_loss"):
        close(getattr(mine, field), getattr(theirs, field), f"{where}: {field} is", tolerance)
    assert mine.targets == theirs.targets, where
    for number, (layer, other) in enumerate(zip(mine.layers, theirs.layers, strict=True)):
        message = f"of MoE layer {number}"
        for field in Ledger._fields:
            book, theirs_ = getattr(layer.ledger, field), getattr(other.ledger, field)
            assert torch.equal(book, theirs_), f"{where}: {field} {message}"
        shares = layer.dropped_gate_mass, other.dropped_gate_mass
        close(*shares, f"{where}: the gate weight dropped {message} is", tolerance)
        by_rank, (in_total,) = torch.tensor(layer.outcomes_by_rank), other.outcomes_by_rank
        assert by_rank.sum(0).tolist() == list(in_total), f"{where}: outcomes by rank {message}"


def close(
    actual: Tensor | float, expected: Tensor | float, what: str, tolerance: float = 1e-10
) -> None:
    """Equal up to rounding; the message has the factor between the two."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    factor = ((actual * expected).sum() / expected.square().sum()).item()
    torch.testing.assert_close(
        actual,
        expected,
        rtol=tolerance,
        atol=tolerance,
        msg=lambda message: f"{what} {factor:.6g} times the reference\n{message}",
    )


def _of_step(fates: Tensor, step: int) -> Tensor:
    """The rows of a step's tokens, in the order of their ids."""
    mine = fates[fates[:, 0] // (BATCH * LENGTH) == step - 1]
    return mine[mine[:, 0].argsort()]


def _same_fates(mine: Tensor, theirs: Tensor, where: str) -> None:
    assert torch.equal(mine[:, 0], theirs[:, 0]), f"{where}: other tokens than in the reference"
    differing = mine[(mine != theirs).any(1), 0].tolist()
    assert not differing, f"{where}: the tokens went to other experts: {differing}"


@contextmanager
def dtypes_of_rows() -> Iterator[set[torch.dtype]]:
    """What experts multiply that are spread over ranks: their rows' types, and their weights'."""
    run, seen = dispatch._run, set[torch.dtype]()

    def watched(feed: Feed, rows_RD: Tensor, *arguments: Any) -> Tensor:
        seen.update((rows_RD.dtype, feed.w_gate_up.dtype, feed.w_down.dtype))
        return run(feed, rows_RD, *arguments)

    with mock.patch.object(dispatch, "_run", watched):
        yield seen
