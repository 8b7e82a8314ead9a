"""What is drawn at random has the distribution that its definition says.

Everything is keyed, so a run is the same every time. A tolerance is four standard errors of the
frequency or mean that it bounds: a right implementation passes for about 9,999 keys of 10,000 per
comparison, and a bias of a few per cent does not.

Shape suffixes: T tokens, E experts, K choices, D width, B sequences, L tokens of a sequence.
"""

from __future__ import annotations

import math
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from runs import train, write_config
from torch import Tensor

from moetrain.moe import Draws, Gate, MoE, Router, Routing, keyed
from moetrain.moe.router import Inputs
from moetrain.sinks import read_metrics

ERRORS = 4
"""Standard errors that a frequency may be off."""


def assert_frequency(count: Tensor | float, expected: Tensor | float, tries: Tensor | int) -> None:
    """Binomial counts against n·p; their standard error is √(n·p·(1 − p))."""
    count, expected, tries = (torch.as_tensor(v).double() for v in (count, expected, tries))
    error = (tries * expected * (1 - expected)).sqrt()
    assert ((count - tries * expected).abs() <= ERRORS * error).all(), (count / tries, expected)


def inputs(x_TD: Tensor, step: int | None = 1, token_T: Tensor | None = None) -> Inputs:
    """Every token real, with ids of its own; step None is evaluation."""
    tokens = torch.arange(len(x_TD))
    draws = None if step is None else Draws(keyed.step_key(0, step), tokens)
    valid_T = torch.ones(len(x_TD), dtype=torch.bool)
    return Inputs(x_TD, valid_T, tokens % 128, token_T, draws, len(x_TD), None)


def identity_router(gate: Gate, experts: int) -> Router:
    """Its logits are what it is given."""
    router = Router(3, gate, experts, experts)
    with torch.no_grad():
        router.weight.copy_(torch.eye(experts))
    return router


# ---- gates ---------------------------------------------------------------------------------------


def test_the_second_expert_is_kept_as_often_as_twice_its_gate() -> None:
    """min(1, 2·g2) is 2·g2, as g2 ≤ ½: in twenty bins over g2, 2,000 tokens each."""
    gate_T = (torch.arange(40_000) + 0.5) / 80_000
    x_TD = torch.stack([(1 - gate_T).log(), gate_T.log(), torch.full_like(gate_T, -30)], 1)
    record = identity_router(Gate("gshard", 2), 3)(inputs(x_TD))
    assert (record.expert_TK == torch.tensor([0, 1])).all()
    assert record.sampled_TK[:, 0].all()
    kept_bins = record.sampled_TK[:, 1].view(20, -1)
    chance_bins = 2 * record.gate_TK[:, 1].detach().view(20, -1)
    # a bin's tokens differ in their chance: the variance of the sum is Σp(1 − p) ≤ n·p̄(1 − p̄)
    assert_frequency(kept_bins.sum(1), chance_bins.mean(1), kept_bins.shape[1])


@pytest.mark.parametrize(
    ("name", "step"), [("random", 1), ("random", None), ("hash", 1), ("hash", None)]
)
def test_every_expert_and_every_pair_is_chosen_as_often(name: Any, step: int | None) -> None:
    """20,000 tokens with as many vocabulary ids: 1/5 for an expert, 1/20 for an ordered pair."""
    tokens, experts = 20_000, 5
    router = Router(3, Gate(name, 2), 4, experts)
    record = router(inputs(torch.zeros(tokens, 4), step, torch.arange(tokens)))
    first_T, second_T = record.expert_TK.unbind(1)
    pair_EE = (first_T * experts + second_T).bincount(minlength=experts**2).view(experts, -1)
    assert (pair_EE.diagonal() == 0).all()
    chance_EE = (1 - torch.eye(experts)) / (experts * (experts - 1))
    assert_frequency(pair_EE, chance_EE, tokens)
    for marginal in (pair_EE.sum(0), pair_EE.sum(1)):
        assert_frequency(marginal, 1 / experts, tokens)


def test_random_choices_of_a_token_change_from_step_to_step_as_chance_has_it() -> None:
    tokens, experts = 20_000, 5
    router = Router(3, Gate("random", 1), 4, experts)
    x_TD = torch.zeros(tokens, 4)
    first, second = (router(inputs(x_TD, step)).expert_TK for step in (1, 2))
    assert_frequency((first == second).sum(), 1 / experts, tokens)


NOISY_TOKENS, NOISY_DRAWS, NOISY_EXPERTS = 6, 5_000, 5


def noisy_record(k: int) -> tuple[Router, Tensor, Routing]:
    """Six tokens, each under 5,000 draws of the noise: records shaped (6, 5000, ·)."""
    generator = torch.Generator().manual_seed(0)
    router = Router(3, Gate("noisy_topk", k), 4, NOISY_EXPERTS)
    with torch.no_grad():
        for weight in (router.weight, router.noise_weight):
            weight.copy_(torch.randn(weight.shape, generator=generator))
    x_TD = torch.randn(NOISY_TOKENS, 4, generator=generator)
    record = router(inputs(x_TD.repeat_interleave(NOISY_DRAWS, 0)))
    return router, x_TD, record


@pytest.mark.parametrize("k", [1, 2, 4])
def test_an_expert_is_among_the_noisy_top_k_as_often_as_its_load_says(k: int) -> None:
    """P(x, i) given the others' noise is the chance of being chosen, so that over many draws the
    number of times chosen, less ΣP, has the variance ΣP(1 − P)."""
    record = noisy_record(k)[2]
    assert record.load_TE is not None
    chosen_TE = torch.zeros_like(record.load_TE).scatter(1, record.expert_TK, 1.0)
    by_token = (NOISY_TOKENS, NOISY_DRAWS)
    chance = record.load_TE.detach().double().unflatten(0, by_token)
    chosen = chosen_TE.double().unflatten(0, by_token)
    error = (chance * (1 - chance)).sum(1).sqrt()
    off = (chosen.sum(1) - chance.sum(1)).abs()
    # 1e-2: the fp32 rounding of Φ near 0 and 1, of 5,000 summands
    assert (off <= ERRORS * error + 1e-2).all(), off / error
    assert ((chance.mean(1) > 0.05) & (chance.mean(1) < 0.95)).sum() >= 10


def test_the_noise_of_the_noisy_gate_is_normal_with_its_learnt_width() -> None:
    """σ = softplus(x·W_n): mean 0 ± σ/√n, standard deviation σ ± σ/√(2n), and 68.27 % within σ."""
    router, x_TD, record = noisy_record(2)
    by_token = (NOISY_TOKENS, NOISY_DRAWS)
    noise = record.logits_TE.detach().double().unflatten(0, by_token)
    noise = noise - (x_TD @ router.weight.T).detach().double()[:, None]
    sigma_TE = torch.nn.functional.softplus(x_TD @ router.noise_weight.T).detach().double()
    allowed_TE = ERRORS * sigma_TE / math.sqrt(NOISY_DRAWS)
    assert (noise.mean(1).abs() <= allowed_TE).all()
    assert ((noise.std(1) - sigma_TE).abs() <= allowed_TE / math.sqrt(2)).all()
    within = (noise.abs() <= sigma_TE[:, None]).sum(1)
    assert_frequency(within, math.erf(1 / math.sqrt(2)), NOISY_DRAWS)
    assert len(sigma_TE.round(decimals=3).unique()) == sigma_TE.numel()


def test_jitter_is_uniform_in_its_range_and_independent_by_dimension() -> None:
    """20,000 tokens of three dimensions: range, tenths of it, and correlations of 0 ± 1/√n."""
    tokens, width = 20_000, 0.1
    router = identity_router(Gate("switch", 1, jitter=width), 3)
    factor_TD = router(inputs(torch.ones(tokens, 3))).logits_TE.detach().double()
    place_TD = (factor_TD - (1 - width)) / (2 * width)
    rounding = 1e-6  # of fp32 near 1, over the range
    assert place_TD.min() >= -rounding
    assert place_TD.max() <= 1 + rounding
    for place_T in place_TD.T:
        assert_frequency(torch.histc(place_T, 10, 0, 1), 1 / 10, tokens)
    off_diagonal = torch.corrcoef(place_TD.T) - torch.eye(3)
    assert off_diagonal.abs().max() <= ERRORS / math.sqrt(tokens)


# ---- drops ---------------------------------------------------------------------------------------


def kept_of_one_expert(policy: Any, top_k: int = 1) -> Tensor:
    """Which tokens keep an expert that all of 10,000 sequences of 32 want: bool (B, L).

    Capacity is 8 of 32 tokens. With two choices, even tokens want it first and odd ones second.
    """
    sequences, length = 10_000, 32
    gate = Gate("topk", top_k)
    factor = 8 * 4 / (top_k * length)
    layer = MoE(3, 2, 4, 4, gate, capacity_factor=factor, drop_policy=policy)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([[2.0, 1.0], [1.0, 2.0], [0.0, 0.0], [-1.0, -1.0]]))
        layer.experts.w_gate_up.fill_(1.0)
        layer.experts.w_down.zero_()
        layer.experts.w_down[0] = 1.0  # only what expert 0 computes is seen
    even, odd = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    x_LD = torch.stack([odd if top_k == 2 and t % 2 else even for t in range(length)])
    draws = Draws(keyed.step_key(0, 1), torch.arange(sequences * length))
    valid_BL = torch.ones(sequences, length, dtype=torch.bool)
    y_BLD = layer(x_LD.expand(sequences, -1, -1), valid_BL, "train", draws)[0]
    kept_BL = y_BLD.detach().ne(0).any(-1)
    assert (kept_BL.sum(1) == 8).all()
    return kept_BL


@pytest.mark.parametrize("top_k", [1, 2])
def test_drop_policy_random_gives_every_token_the_same_chance(top_k: int) -> None:
    """8 of 32, first or second choice, early or late; and neighbours do not lose together."""
    kept_BL = kept_of_one_expert("random", top_k)
    assert_frequency(kept_BL.sum(0), 8 / 32, len(kept_BL))
    both = (kept_BL[:, :-1] & kept_BL[:, 1:]).sum(0)
    assert_frequency(both, (8 / 32) * (7 / 31), len(kept_BL))


def test_drop_policy_position_gives_later_tokens_none() -> None:
    """And with two choices none to second choices, before every first is served."""
    assert kept_of_one_expert("position").sum(0).tolist() == [10_000] * 8 + [0] * 24
    first = [10_000 if t % 2 == 0 and t < 16 else 0 for t in range(32)]
    assert kept_of_one_expert("position", top_k=2).sum(0).tolist() == first


# ---- what the balance loss is for ----------------------------------------------------------------


def last_ten_steps(folder: Path, balance_coef: float) -> tuple[float, float]:
    """Mean over layers and steps of max/mean load, and of the drop rate, after 40 steps."""
    folder.mkdir()
    config = write_config(
        folder,
        moe={
            "router": "noisy_topk",
            "experts": 8,
            "balance_coef": balance_coef,
            "first_dense": 0,
        },
        train={"steps": 40, "micro_batch": 8, "warmup_steps": 5, "lr": 1e-2},
        eval={"every": 0},
        checkpoint={"every": 0},
    )
    assert train(config) == 0
    last = read_metrics(folder / "runs" / "run")[-10:]
    heaviest = [1 + layer["max_vio"] for line in last for layer in line["layers"]]
    return mean(heaviest), mean(line["drop_rate"] for line in last)


def test_without_its_losses_the_noisy_gate_overloads_an_expert(tmp_path: Path) -> None:
    """1701.06538 Table 6 in small. With three seeds the busiest expert had 2.36 to 2.42 times its
    share without the losses and 1.15 to 1.17 with them; 36 to 38 % were dropped, against 12 %."""
    load_without, dropped_without = last_ten_steps(tmp_path / "without", 0.0)
    load_with, dropped_with = last_ten_steps(tmp_path / "with", 0.1)
    assert load_without > 2.0
    assert load_with < 1.4
    assert dropped_without > dropped_with + 0.1
