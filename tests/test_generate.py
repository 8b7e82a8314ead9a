"""Generation against plain forward passes, and samplers against the distributions they promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from models import follower, initialised, random_tokens, small_config
from runs import save_model
from torch import Tensor

from moetrain import cli
from moetrain.generate import among, continuations, greedy, sampler
from moetrain.model import KVCache, Transformer

LOGITS_V = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]))
DRAWS = 20_000


def drawn(temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0) -> list[float]:
    """How often every token of `LOGITS_V` comes."""
    draw = sampler(temperature, top_k, top_p, torch.Generator().manual_seed(0))
    token_B = draw(LOGITS_V.expand(DRAWS, -1))
    assert token_B.dtype == torch.int64
    return (token_B.bincount(minlength=5) / DRAWS).tolist()


def assert_drawn(found: list[float], weights: list[float]) -> None:
    """Frequencies within five standard errors, and never what has no weight."""
    for frequency, weight in zip(found, weights, strict=True):
        share = weight / sum(weights)
        assert abs(frequency - share) <= 5 * math.sqrt(share * (1 - share) / DRAWS)


def test_the_softmax_itself():
    assert_drawn(drawn(), [0.1, 0.4, 0.05, 0.25, 0.2])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_is_an_exponent_of_the_probabilities(temperature):
    weights = [p ** (1 / temperature) for p in (0.1, 0.4, 0.05, 0.25, 0.2)]
    assert_drawn(drawn(temperature), weights)


def test_a_low_temperature_is_greedy():
    assert drawn(temperature=1e-4) == [0, 1, 0, 0, 0]


@pytest.mark.parametrize(
    ("top_k", "weights"),
    [
        (1, [0, 1, 0, 0, 0]),
        (2, [0, 0.4, 0, 0.25, 0]),
        (3, [0, 0.4, 0, 0.25, 0.2]),
        (9, [0.1, 0.4, 0.05, 0.25, 0.2]),  # more than there are
    ],
)
def test_top_k_keeps_the_likeliest(top_k, weights):
    assert_drawn(drawn(top_k=top_k), weights)


@pytest.mark.parametrize(
    ("top_p", "weights"),
    [
        (1e-6, [0, 1, 0, 0, 0]),  # never fewer than one
        (0.39, [0, 1, 0, 0, 0]),
        (0.41, [0, 0.4, 0, 0.25, 0]),  # the token that crosses the border is in
        (0.64, [0, 0.4, 0, 0.25, 0]),
        (0.66, [0, 0.4, 0, 0.25, 0.2]),
        (0.97, [0.1, 0.4, 0.05, 0.25, 0.2]),
        (1.0, [0.1, 0.4, 0.05, 0.25, 0.2]),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(top_p, weights):
    assert_drawn(drawn(top_p=top_p), weights)


def test_top_p_counts_after_top_k():
    # Of the two likeliest, 0.4 and 0.25, the first has 0.615 of what is left.
    assert_drawn(drawn(top_k=2, top_p=0.6), [0, 1, 0, 0, 0])
    assert_drawn(drawn(top_k=2, top_p=0.63), [0, 0.4, 0, 0.25, 0])


def test_a_seed_repeats_and_another_does_not():
    def tokens(seed: int) -> list[int]:
        draw = sampler(1.0, None, 1.0, torch.Generator().manual_seed(seed))
        return torch.cat([draw(LOGITS_V[None]) for _ in range(30)]).tolist()

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)


def test_sequences_are_drawn_each_from_its_own_logits():
    logits_BV = torch.full((3, 5), -100.0)
    logits_BV[[0, 1, 2], [4, 0, 2]] = 0
    draw = sampler(1.0, None, 1.0, torch.Generator().manual_seed(0))
    assert draw(logits_BV).tolist() == greedy(logits_BV).tolist() == [4, 0, 2]


def test_ids_that_no_token_has_are_never_drawn():
    """Not even the likeliest; the others share the probability as before."""
    choose = among([0, 2, 3], sampler(1.0, None, 1.0, torch.Generator().manual_seed(0)))
    token_B = choose(LOGITS_V.expand(DRAWS, -1))
    found = (token_B.bincount(minlength=5) / DRAWS).tolist()
    assert_drawn(found, [0.1, 0, 0.05, 0.25, 0])
    assert among([0, 2, 3], greedy)(LOGITS_V[None]).tolist() == [3]


# ---------------------------------------------------------------- with and without a cache


def with_cache(model: Transformer, prompt_BL: Tensor, count: int) -> Tensor:
    return torch.stack(list(continuations(model, prompt_BL, count, greedy)), dim=1)


@torch.no_grad()
def without_cache(model: Transformer, prompt_BL: Tensor, count: int) -> Tensor:
    """Everything from the start for each token."""
    tokens_BL = prompt_BL
    for _ in range(count):
        logits_BLV = model(tokens_BL, mode="generate").logits_BLV
        assert logits_BLV is not None
        tokens_BL = torch.cat([tokens_BL, logits_BLV[:, -1].argmax(-1, keepdim=True)], dim=1)
    return tokens_BL[:, prompt_BL.shape[1] :]


@pytest.mark.parametrize(
    "sections",
    [
        {"model": {"kv_heads": 2, "qk_norm": "full"}},
        {"moe": {"router": "gshard", "shared_experts": 1, "every": 2}},
        {"moe": {"experts": 0}},
    ],
)
@pytest.mark.parametrize("prompt_length", [1, 7])
def test_greedy_with_a_cache_is_greedy_without(sections, prompt_length):
    model = initialised(small_config(**sections))
    with torch.no_grad():  # weights that do not fall into repeating one token
        for parameter in model.parameters():
            parameter.mul_(3)
    prompt_BL = random_tokens(3, prompt_length)
    text_BL = with_cache(model, prompt_BL, 20)
    assert torch.equal(text_BL, without_cache(model, prompt_BL, 20))
    assert len(set(text_BL.flatten().tolist())) > 5


GATES: dict[str, dict[str, object]] = {
    "switch": {"top_k": 1, "jitter": 0.1},
    "gshard": {},
    "topk": {"drop_policy": "spill"},
    "noisy_topk": {"drop_policy": "random"},
    "sigmoid": {"expert_groups": 2, "top_groups": 1, "drop_policy": "probability"},
    "hash": {},
    "random": {},
    "balanced": {"top_k": 1},
    "dense": {"top_k": 4},
    "hierarchical": {"expert_groups": 2, "top_groups": 2},
}


@pytest.mark.parametrize("router", GATES)
@torch.no_grad()
def test_every_gate_routes_a_token_alike_with_and_without_a_cache(router):
    """Also those that go by position or vocabulary id; nothing is drawn and nothing dropped."""
    config = small_config(moe={"router": router, "capacity_factor": 0.1, **GATES[router]})
    model = initialised(config)
    for name, weight in [*model.named_parameters(), *model.named_buffers()]:
        if "router" in name:  # zero at first where noise or bias is to decide
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    tokens_BL = random_tokens(2, 9)
    whole = model(tokens_BL, mode="generate")
    cache = KVCache(len(model.blocks), 9)
    parts = [model(t, mode="generate", cache=cache) for t in tokens_BL.split([4, 1, 1, 3], dim=1)]
    torch.testing.assert_close(
        torch.cat([part.logits_BLV for part in parts], 1), whole.logits_BLV, rtol=1e-10, atol=1e-12
    )
    for layer, stats in enumerate(whole.layers):
        counts = [part.layers[layer].ledger.outcome_EKO for part in parts]
        assert torch.equal(torch.stack(counts).sum(0), stats.ledger.outcome_EKO)
        assert stats.ledger.outcome_EKO[..., 0].sum() == 2 * 9 * config.moe.top_k


@torch.no_grad()
def test_generation_never_drops():
    moe = {"capacity_factor": 0.1, "eval_capacity_factor": 0.1}
    model = initialised(small_config(moe=moe))
    roomy = initialised(small_config(moe=dict.fromkeys(moe)))
    tokens_BL = random_tokens(2, 8)
    dropping = model(tokens_BL)
    assert any(stats.ledger.outcome_EKO[..., 2].sum() > 0 for stats in dropping.layers)
    generating = model(tokens_BL, mode="generate")
    for stats in generating.layers:
        assert stats.ledger.outcome_EKO[..., 0].sum() == 2 * 2 * 8
    assert torch.equal(generating.logits_BLV, roomy(tokens_BL).logits_BLV)
    assert torch.equal(with_cache(model, tokens_BL, 5), with_cache(roomy, tokens_BL, 5))


def test_a_prompt_may_be_longer_than_a_training_sequence():
    model = initialised(small_config(moe={"group": 4}))
    assert with_cache(model, random_tokens(1, 13), 4).shape == (1, 4)


def test_tokens_come_one_by_one():
    model = initialised(small_config())
    stream = continuations(model, random_tokens(1, 3), 1_000, greedy)
    first = list(itertools.islice(stream, 3))
    assert [token.shape for token in first] == [(1,)] * 3


# ---------------------------------------------------------------- from a checkpoint


@pytest.fixture(scope="module")
def checkpointed(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        run = tmp_path_factory.mktemp("run")
        save_model(run, *follower({ord(a): ord(b) for a, b in ("ab", "bc", "xy", "yx")}))
        yield run


def generate(*args: object) -> int:
    return cli.main(["generate", *map(str, args)])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a", "abc"),  # and then the end of text
        ("b", "bc"),
        ("c", "c"),
        ("x", "xyxyx"),  # four tokens and no end
    ],
)
def test_text_ends_at_the_end_token_or_after_max_tokens(checkpointed, capsys, prompt, text):
    args = ("--prompt", prompt, "--max-tokens", 4)
    assert generate(checkpointed, *args, "--greedy") == 0
    assert capsys.readouterr().out == text + "\n"
    assert generate(checkpointed / "checkpoints" / "step-00000001", *args, "--top-k", 1) == 0
    assert capsys.readouterr().out == text + "\n"


def test_a_seed_repeats_the_text_and_another_does_not(checkpointed, capsys):
    texts = []
    for seed in (0, 0, 1):
        # So hot that every byte is about as likely.
        flags = ("--max-tokens", 20, "--temperature", 1e9, "--seed", seed)
        assert generate(checkpointed, "--prompt", "a", *flags) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


def test_a_model_whose_experts_choose_is_refused(tmp_path, capsys, monkeypatch):
    """What they choose depends on text that is not written yet."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    config = small_config(moe={"router": "expert_choice", "allow_noncausal": True})
    save_model(tmp_path, config, initialised(config, torch.float32, vocab_size=257))
    assert generate(tmp_path, "--prompt", "a") == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert "moe.router (expert_choice) of" in error
    assert "cannot generate" in error
    assert "moetrain eval" in error


def test_an_empty_prompt_and_a_missing_run_are_refused(checkpointed, capsys, tmp_path):
    assert generate(checkpointed, "--prompt", "") == 2
    assert "prompt ('') must hold some text" in capsys.readouterr().err
    assert generate(tmp_path, "--prompt", "a") == 2
    assert str(tmp_path) in capsys.readouterr().err
