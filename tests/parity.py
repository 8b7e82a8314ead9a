"""The same steps twice: by one process that knows nothing of ranks, and by the ranks of a layout.

`alone` is the reference: a plain model in fp64, the whole global batch in one forward and backward
pass, the objective and the clipping written out, unfused AdamW. `on_rank` is one rank of the real
thing: mesh, engine and training step as a run has them. `agree` compares everything that comes of
the two.

Shape suffixes: B sequences, L tokens of a sequence, T = B·L, K choices, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from layouts import BATCH, CLIP_NORM, IGNORE, LENGTH, STEPS, VOCAB, Text
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from moetrain.build import build_model
from moetrain.config import Config, TrainConfig
from moetrain.data import Batch
from moetrain.engines.torch import TorchEngine
from moetrain.evaluate import evaluate
from moetrain.mesh import Mesh
from moetrain.model import Output, Transformer, initial_value
from moetrain.moe import Dispatcher, Draws, Ledger, MoE, Plan
from moetrain.moe.keyed import step_key
from moetrain.objective import Means, reduce
from moetrain.train import Position, Run, train_step

# ---- what came of it -----------------------------------------------------------------------------


Tensors = Mapping[str, Tensor]


class Step(NamedTuple):
    """One optimizer step; norm and gradients are those before clipping."""

    means: Means
    grad_norm: float
    grads: Tensors


class Outcome(NamedTuple):
    """A whole training, in logical tensors."""

    initial: Tensors
    steps: list[Step]
    weights: Tensors
    fates: list[Tensor]
    """One table per MoE layer: a row per valid token, with its global id and the expert that kept
    it, choice by choice, -1 for none."""


class Noting:
    """A dispatcher that notes who was kept, in front of the real one."""

    def __init__(self, dispatcher: Dispatcher):
        self.dispatcher = dispatcher
        self.kept: list[Tensor] = []

    def dispatch(self, x_TD: Tensor, plan: Plan) -> Any:
        """See `Dispatcher`."""
        self.kept.append(_expert_of_row(plan).take(plan.row_TK))
        return self.dispatcher.dispatch(x_TD, plan)

    def combine(self, rows: Tensor, arrived: Any, plan: Plan, gate_TK: Tensor) -> Tensor:
        """See `Dispatcher`."""
        return self.dispatcher.combine(rows, arrived, plan, gate_TK)


def _expert_of_row(plan: Plan) -> Tensor:
    """The expert of every row of the buffer, and -1 for the row past the end."""
    rows = plan.count_E if plan.rows_per_expert is None else plan.rows_per_expert
    experts = torch.arange(len(plan.count_E)).repeat_interleave(rows)
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


def note(model: nn.Module) -> list[Noting]:
    """Put a note-taker in front of every MoE layer's dispatcher."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    for layer in layers:
        layer.dispatcher = Noting(layer.dispatcher)
    return [layer.dispatcher for layer in layers]  # type: ignore[misc]


def fates(notes: list[Noting], batches: list[Batch]) -> list[Tensor]:
    """See `Outcome.fates`."""
    valid = torch.cat([batch.valid_BL.flatten() for batch in batches])
    ids = torch.cat([batch.token_id_BL.flatten() for batch in batches])
    return [torch.cat([ids[:, None], torch.cat(n.kept)], dim=1)[valid] for n in notes]


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
    initial, results = _full(weights), []
    optimizer = _plain_adamw(config.train, weights)
    for step in range(1, steps + 1):
        batch = serving.batch(range((step - 1) * BATCH, step * BATCH))
        draws = Draws(step_key(config.seed, step), batch.token_id_BL.flatten())
        output = plain_forward(model, batch, "train", draws)
        losses = loss, balance_loss, z_loss = plain_losses(config, output, batch)
        moe = config.moe
        optimizer.zero_grad()
        (loss + moe.balance_coef * balance_loss + moe.z_loss_coef * z_loss).backward()
        grads = _grads(weights)
        norm = sum(grad.square().sum().item() for grad in grads.values()) ** 0.5
        if norm > CLIP_NORM:
            for weight in weights.values():
                weight.grad *= CLIP_NORM / norm
        results.append(Step(plain_means(losses, output), norm, grads))
        optimizer.step()
    return Outcome(initial, results, _full(weights), fates(notes, serving.batches))


def plain_forward(model: Transformer, batch: Batch, mode: Any, draws: Draws | None) -> Output:
    """The whole logits rather than the loss."""
    return model(
        batch.tokens_BL,
        valid_BL=batch.valid_BL,
        document_BL=batch.document_BL,
        mode=mode,
        draws=draws,
    )


def plain_losses(config: Config, output: Output, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy, balance and z-loss by their definition; a mean over nothing is 0."""
    assert output.logits_BLV is not None
    group = LENGTH if config.moe.group == "sequence" else config.moe.group
    assert isinstance(group, int)
    tokens = [token for row in batch.valid_BL for token in row]
    num_groups = sum(any(tokens[i : i + group]) for i in range(0, len(tokens), group))
    log_prob = output.logits_BLV.log_softmax(-1).flatten(0, 1)
    targets = batch.targets_BL.flatten().tolist()
    losses = [-log_prob[t, target] for t, target in enumerate(targets) if target != IGNORE]
    return (
        torch.stack(losses).mean() if losses else 0 * log_prob.sum(),
        torch.stack([layer.balance_sum for layer in output.layers]).mean() / max(1, num_groups),
        torch.stack([layer.z_sum for layer in output.layers]).mean() / max(1, sum(tokens)),
    )


def plain_means(losses: tuple[Tensor, Tensor, Tensor], output: Output) -> Means:
    """The same as the numbers that a step reports."""
    loss, balance_loss, z_loss = (value.item() for value in losses)
    return Means(loss, balance_loss, z_loss, tuple(layer.ledger for layer in output.layers))


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
        assert weight.grad is not None, f"{name} has no gradient"
    return _full({name: weight.grad for name, weight in weights.items()})  # type: ignore[misc]


def _full(tensors: Tensors) -> Tensors:
    """Logical copies of tensors, sharded or not."""
    return {
        name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
        for name, t in tensors.items()
    }


# ---- one rank of many ----------------------------------------------------------------------------


class Watched:
    """An engine that notes the gradients before each step, in front of the real one."""

    def __init__(self, engine: TorchEngine):
        self.engine, self.model = engine, engine.model
        self.grads: Tensors = {}

    def backward(self, loss: Tensor, last: bool) -> None:
        """See `Engine`."""
        self.engine.backward(loss, last)

    def step(self, lr: float) -> float:
        """See `Engine`."""
        self.grads = _grads(self.engine.weights)
        return self.engine.step(lr)

    def state(self) -> Tensors:
        """See `Engine`."""
        return self.engine.state()


def evaluated(config: Config, text: Text, sequences: int) -> Means:
    """Evaluate as one rank of the process group does."""
    run = build_run(config, text)
    return evaluate(run.engine.model, run.held_out, sequences, config, run.mesh)


def evaluated_alone(config: Config, text: Text, sequences: int) -> Means:
    """Evaluate without ranks, all sequences at once."""
    batch = text.batch(range(sequences))
    with torch.no_grad():
        output = plain_forward(plain_model(config), batch, "eval", None)
        return plain_means(plain_losses(config, output, batch), output)


def build_run(config: Config, text: Text, change: Change | None = None) -> Run:
    """A run of this rank, with routers changed before the first step."""
    mesh = Mesh(torch.device("cpu"), config.parallel.ep, config.parallel.dp_replicate)
    model = build_model(config, VOCAB)
    engine = TorchEngine(model, mesh, config.engine.precision, config.seed, config.train)
    for name, weight in engine.weights.items():
        if change and "router" in name:
            assert isinstance(weight, DTensor)
            value = change(weight.full_tensor().detach())
            where = weight.device_mesh, weight.placements
            with torch.no_grad():
                weight.copy_(distribute_tensor(value, *where, src_data_rank=None))
    serving: Any = Serving(text)
    # There is nothing prepared and no folder: a step reads neither.
    return Run(config, Path(), mesh, None, Watched(engine), serving, serving)  # type: ignore[arg-type]


def on_rank(
    config: Config, text: Text, change: Change | None = None, steps: int = STEPS
) -> Outcome:
    """Train as one rank of the process group does; fates are those of its own tokens."""
    run = build_run(config, text, change)
    watched: Any = run.engine
    weights, notes = watched.engine.weights, note(watched.model)
    initial, results = _full(weights), []
    for step in range(steps):
        result = train_step(run, Position(step, step * BATCH, step * BATCH * LENGTH))
        means = reduce(result.parts, result.counts, run.mesh)
        results.append(Step(means, result.grad_norm, watched.grads))
    serving: Any = run.samples
    return Outcome(initial, results, _full(weights), fates(notes, serving.batches))


# ---- the comparison ------------------------------------------------------------------------------


def agree(ranks: list[Outcome], expected: Outcome) -> None:
    """Every rank against the reference, step by step; the message says what differs, and how."""
    for number, rank in enumerate(ranks):
        for name, value in expected.initial.items():
            assert torch.equal(rank.initial[name], value), f"rank {number}: {name} starts otherwise"
    for step, theirs in enumerate(expected.steps, 1):
        for layer, table in enumerate(expected.fates):
            mine = torch.cat([rank.fates[layer] for rank in ranks])
            where = f"step {step}, MoE layer {layer}"
            _same_fates(_of_step(mine, step), _of_step(table, step), where)
        for number, rank in enumerate(ranks):
            agree_on_step(rank.steps[step - 1], theirs, f"rank {number}, step {step}")
    for number, rank in enumerate(ranks):
        for name, value in expected.weights.items():
            close(rank.weights[name], value, f"rank {number}: {name} ends up")


def agree_on_step(mine: Step, theirs: Step, where: str) -> None:
    """Losses, ledgers, gradients and their norm in one step."""
    agree_on_means(mine.means, theirs.means, where)
    for name, grad in theirs.grads.items():
        close(mine.grads[name], grad, f"{where}: the gradient of {name} is")
    close(mine.grad_norm, theirs.grad_norm, f"{where}: the global gradient norm is")


def agree_on_means(mine: Means, theirs: Means, where: str) -> None:
    """Losses up to rounding, ledgers exactly."""
    for field in ("loss", "balance_loss", "z_loss"):
        close(getattr(mine, field), getattr(theirs, field), f"{where}: {field} is")
    for layer, (book, other) in enumerate(zip(mine.ledgers, theirs.ledgers, strict=True)):
        for field in Ledger._fields:
            message = f"{where}: {field} of MoE layer {layer}"
            assert torch.equal(getattr(book, field), getattr(other, field)), message


def close(actual: Tensor | float, expected: Tensor | float, what: str) -> None:
    """Equal up to the rounding of fp64; the message has the factor between the two."""
    actual, expected = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, expected))
    factor = ((actual * expected).sum() / expected.square().sum()).item()
    torch.testing.assert_close(
        actual,
        expected,
        rtol=1e-10,
        atol=1e-10,
        msg=lambda message: f"{what} {factor:.6g} times the reference\n{message}",
    )


def _of_step(fates: Tensor, step: int) -> Tensor:
    """The rows of a step's tokens, in the order of their ids."""
    mine = fates[fates[:, 0] // (BATCH * LENGTH) == step - 1]
    return mine[mine[:, 0].argsort()]


def _same_fates(mine: Tensor, theirs: Tensor, where: str) -> None:
    assert torch.equal(mine[:, 0], theirs[:, 0]), f"{where}: other tokens than in the reference"
    differing = mine[(mine != theirs).any(1), 0].tolist()
    assert not differing, f"{where}: other experts kept the tokens {differing}"
