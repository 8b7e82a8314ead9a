"""Text from a trained model, token by token with a key-value cache. Generation never drops.

Shape suffixes: B sequences, L tokens, V vocabulary, I ids of the tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from moetrain import restore
from moetrain.data import load_chat
from moetrain.errors import UserError
from moetrain.mesh import process_group, rank_and_world
from moetrain.model import KVCache, Transformer

Sampler = Callable[[Tensor], Tensor]
"""Logits (B, V) to the next tokens (B,)."""


def greedy(logits_BV: Tensor) -> Tensor:
    """The most likely token."""
    return logits_BV.argmax(-1)


def sampler(
    temperature: float, top_k: int | None, top_p: float, generator: torch.Generator
) -> Sampler:
    """Draw from the softmax of logits / temperature, cut to its likeliest tokens.

    `top_k` keeps the k likeliest (1805.04833); `top_p` the fewest that reach that probability
    together (1904.09751), counted after top_k.
    """

    def draw(logits_BV: Tensor) -> Tensor:
        sorted_BV, token_BV = (logits_BV.float() / temperature).sort(-1, descending=True)
        prob_BV = sorted_BV[:, :top_k].softmax(-1)
        before_BV = prob_BV.cumsum(-1) - prob_BV
        prob_BV = prob_BV.masked_fill(before_BV >= top_p, 0.0)
        place_B1 = torch.multinomial(prob_BV.cpu(), 1, generator=generator).to(prob_BV.device)
        return token_BV.gather(1, place_B1)[:, 0]

    return draw


def among(ids: Sequence[int], sample: Sampler) -> Sampler:
    """Sample from some ids alone: a padded vocabulary has logits that stand for no token."""

    def choose(logits_BV: Tensor) -> Tensor:
        id_I = torch.tensor(ids, device=logits_BV.device)
        return id_I[sample(logits_BV[:, id_I])]

    return choose


@torch.no_grad()
def continuations(
    model: Transformer, prompt_BL: Tensor, max_tokens: int, sample: Sampler
) -> Iterator[Tensor]:
    """Yield the next token of every sequence, int64 (B,), `max_tokens` times.

    The prompts have equal length and no padding.
    """
    cache = KVCache(len(model.blocks), prompt_BL.shape[1] + max_tokens)
    tokens_BL = prompt_BL
    for _ in range(max_tokens):
        logits_BLV = model(tokens_BL, mode="generate", cache=cache).logits_BLV
        token_B = sample(logits_BLV[:, -1])
        yield token_B
        tokens_BL = token_B[:, None]


def run(
    path: Path | str,
    *,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float,
    greedy: bool,
    seed: int,
    chat: bool = False,
) -> None:
    """Print a prompt and its continuation by the model of a run or checkpoint.

    With `chat` the prompt is a user's message, put as the chat template has it, and the answer
    alone is printed. Ends early at the end-of-text token, or at the end of a turn. Raises UserError
    for an empty prompt, several ranks, or a model whose experts choose their tokens.
    """
    if rank_and_world()[1] > 1:
        raise UserError("generate runs in one process; start it without torchrun")
    found = restore.find(path)
    require_causal(found)
    tokenizer = restore.tokenizer(found)
    prompt_ids = tokenizer.encode_batch([prompt])[0].tolist()
    if not prompt_ids:
        raise UserError("prompt ('') must hold some text; try 'import '")
    ends = {tokenizer.eos_id}
    if chat:
        template = load_chat(found.config.data, tokenizer)
        prompt_ids, ends = template.prompt(prompt).tolist(), template.end_ids
    choose = among(tokenizer.ids, _chooser(greedy, temperature, top_k, top_p, seed))
    with process_group() as device:
        model = restore.model_on_device(found, device)
        prompt_BL = torch.tensor([prompt_ids], device=device)
        new_ids: list[int] = []
        for token_B in continuations(model, prompt_BL, max_tokens, choose):
            if token_B.item() in ends:
                break
            new_ids.append(int(token_B))
    print(("" if chat else prompt) + tokenizer.decode(new_ids))


def require_causal(found: restore.Checkpoint) -> None:
    """Raise UserError for a model whose experts choose their tokens."""
    if found.config.moe.experts and found.config.moe.router == "expert_choice":
        raise UserError(
            f"moe.router (expert_choice) of {found.path} cannot generate: its experts choose among "
            "all tokens of a text, those still to be written included; evaluate it with moetrain "
            "eval, or train one with another moe.router"
        )


def _chooser(
    is_greedy: bool, temperature: float, top_k: int | None, top_p: float, seed: int
) -> Sampler:
    if is_greedy:
        return greedy
    return sampler(temperature, top_k, top_p, torch.Generator().manual_seed(seed))
