"""What all contenders get: tokens, a router, experts, and the choices that these come to.

The choices are made first. The router's rows are orthonormal, and every token holds the logits that
its choices need in the space of these rows and noise beside it, so that any linear router, in bf16
too, chooses what was wanted.

Shape suffixes: T tokens, D model width, F expert hidden width, E experts, e experts on this rank,
K choices.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Routing = Literal["balanced", "zipf"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LOWEST, STEP = 2.0, 0.25
"""The logit of the last choice, and how much more each choice before it has. Others have 0."""
EXPONENT = 1.0
"""Of Zipf's law: an expert's popularity is 1/rank**EXPONENT."""


class Shape(NamedTuple):
    """Sizes of a layer."""

    dim: int
    expert_dim: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        return f"D {self.dim}, F {self.expert_dim}, E {self.experts}, K {self.top_k}"


class Cell(NamedTuple):
    """What is measured: a layer's shape and its work."""

    shape: Shape
    tokens: int
    """Of all ranks together."""
    routing: Routing
    dtype: str
    """Of tokens and experts: a name in `DTYPES`."""
    ranks: int = 1
    """Over which experts and tokens are spread evenly."""
    is_checked: bool = False
    """Whether outputs and input gradients are wanted, not speed."""

    def __str__(self) -> str:
        spread = f"EP {self.ranks}, " if self.ranks > 1 else ""
        return f"{self.shape}; {spread}{self.tokens} tokens, {self.routing}, {self.dtype}"

    def problem(self) -> str | None:
        """Why the cell cannot be, if so."""
        experts, top_k = self.shape.experts, self.shape.top_k
        if self.ranks < 1 or experts % self.ranks:
            return f"ep {self.ranks} must divide the {experts} experts"
        unit = self.ranks * experts // top_k  # an order of all experts for every rank
        if self.tokens < 1 or self.tokens % unit:
            return f"tokens {self.tokens} must be a multiple of {unit} ({self.shape})"
        return None


class Tokens(NamedTuple):
    """This rank's share of what goes through the layer."""

    x_TD: Tensor
    grad_TD: Tensor
    """Gradient of the output."""
    expert_TK: Tensor
    """int64: the choices, best first."""


class Weights(NamedTuple):
    """The whole router, in fp32, and this rank's experts: SwiGLU, gate and up side by side."""

    router_ED: Tensor
    gate_up_eDF: Tensor
    """(e, D, 2F)"""
    down_eFD: Tensor


def choices(cell: Cell) -> Tensor:
    """The experts of every token, best first: (T, K), int64, those of rank 0 first.

    Balanced: on every rank, every expert is asked equally often; neighbours share out a random
    order of all experts. Zipf: drawn without replacement by popularity (Gumbel's trick).
    """
    shape, generator = cell.shape, torch.Generator().manual_seed(1)
    if cell.routing == "balanced":
        num_orders = cell.tokens * shape.top_k // shape.experts
        orders = torch.rand(num_orders, shape.experts, generator=generator)
        return orders.argsort(1).view(cell.tokens, shape.top_k)
    log_popularity_E = -EXPONENT * torch.arange(1, shape.experts + 1).log()
    uniform_TE = torch.rand(cell.tokens, shape.experts, generator=generator)
    gumbel_TE = -(-uniform_TE.clamp(min=1e-9).log()).log()
    return (log_popularity_E + gumbel_TE).topk(shape.top_k, 1).indices


def tokens(cell: Cell, rank: int, device: torch.device) -> Tokens:
    """Vectors whose logits choose what `choices` says, and gradients for what comes of them."""
    shape, dtype = cell.shape, DTYPES[cell.dtype]
    num_tokens = cell.tokens // cell.ranks
    expert_TK = choices(cell)[rank * num_tokens :][:num_tokens].to(device)
    logit_K = LOWEST + STEP * torch.arange(shape.top_k - 1, -1, -1, device=device)
    logits_TE = torch.zeros(num_tokens, shape.experts, device=device)
    logits_TE.scatter_(1, expert_TK, logit_K.expand_as(expert_TK))
    generator = torch.Generator(device).manual_seed(2 + rank)
    noise_TD, grad_TD = (
        torch.randn(num_tokens, shape.dim, generator=generator, device=device) for _ in range(2)
    )
    router_ED = _router(shape, device)
    x_TD = noise_TD - F.linear(noise_TD, router_ED) @ router_ED + logits_TE @ router_ED
    return Tokens(x_TD.to(dtype), grad_TD.to(dtype), expert_TK)


def weights(cell: Cell, rank: int, device: torch.device) -> Weights:
    """The same for all contenders, of the size that they are initialised to."""
    shape, dtype = cell.shape, DTYPES[cell.dtype]
    size = shape.experts // cell.ranks
    mine = range(rank * size, (rank + 1) * size)
    gate_up = torch.empty(size, shape.dim, 2 * shape.expert_dim, dtype=dtype, device=device)
    down = torch.empty(size, shape.expert_dim, shape.dim, dtype=dtype, device=device)
    for place, expert in enumerate(mine):
        generator = torch.Generator(device).manual_seed(1000 + expert)
        for weight in (gate_up[place], down[place]):
            drawn = torch.randn(weight.shape, generator=generator, device=device)
            weight.copy_(drawn * len(weight) ** -0.5)
    return Weights(_router(shape, device), gate_up, down)


def _router(shape: Shape, device: torch.device) -> Tensor:
    """Orthonormal rows: (E, D)."""
    generator = torch.Generator(device).manual_seed(0)
    columns = torch.randn(shape.dim, shape.experts, generator=generator, device=device)
    return torch.linalg.qr(columns).Q.T.contiguous()


def useful_flops(shape: Shape, rows: int) -> int:
    """Of the experts' three products on so many rows, and of their gradients."""
    return 3 * rows * 3 * 2 * shape.dim * shape.expert_dim


def reference(cell: Cell, device: torch.device) -> tuple[Tensor, Tensor]:
    """Output and input gradient of all ranks' tokens where nothing is dropped, token by token in
    fp64: (T, D) each."""
    whole = cell._replace(ranks=1)
    router_ED, gate_up_EDF, down_EFD = (w.double() for w in weights(whole, 0, device))
    outputs, gradients = [], []
    for rank in range(cell.ranks):
        x_TD, grad_TD, _ = tokens(cell, rank, device)
        for x_D, grad_D in zip(x_TD.double(), grad_TD.double(), strict=True):
            x_D.requires_grad_()
            best = (router_ED @ x_D).softmax(0).topk(cell.shape.top_k)
            y_D = torch.zeros_like(x_D)
            for gate, expert in zip(best.values / best.values.sum(), best.indices, strict=True):
                gate_F, up_F = (x_D @ gate_up_EDF[expert]).chunk(2)
                y_D = y_D + gate * ((F.silu(gate_F) * up_F) @ down_EFD[expert])
            y_D.backward(grad_D)
            assert x_D.grad is not None
            outputs.append(y_D.detach())
            gradients.append(x_D.grad)
    return torch.stack(outputs), torch.stack(gradients)
