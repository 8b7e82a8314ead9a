"""The tensors of Hugging Face's formats, as parts of ours.

Names are those of published checkpoints, one tensor for each matrix of an expert, which
transformers, vLLM and others read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from torch import Tensor

from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.hf.formats import FORMATS, PROJECTIONS, Format
from moetrain.hf.names import FormatName

MOST_NAMES = 20
"""That a message lists of a kind."""


def require_none(named: Mapping[str, Iterable[str]]) -> None:
    """UserError with the names of every kind, by what is wrong with them, if there are any."""
    lines = []
    for what, names in named.items():
        if listed := sorted(names):
            more = len(listed) - MOST_NAMES
            told = ", ".join(listed[:MOST_NAMES]) + (f" and {more:,} more" if more > 0 else "")
            lines.append(f"{what}: {told}")
    if lines:
        raise UserError("\n".join(lines))


class Part(NamedTuple):
    """A tensor of theirs, as a part of one of ours."""

    name: str
    """Theirs."""
    ours: str
    expert: int | None = None
    """Whose matrix it is, if any expert's."""
    half: int | None = None
    """Of the gate and up projections, which are one matrix of ours: 0 or 1."""

    def of(self, tensor: Tensor) -> Tensor:
        """It as a view of ours. Matrices are (out, in), but those of our experts (in, out)."""
        matrix = tensor if self.expert is None else tensor[self.expert].mT
        return matrix if self.half is None else matrix.chunk(2)[self.half]


PLAIN = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
}
QK_NORMS = {
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
}
"""Ours and theirs, inside a block."""


def parts(name: FormatName, config: Config) -> Iterator[Part]:
    """All tensors of theirs, in the order of the model."""
    format_, model, moe = FORMATS[name], config.model, config.moe
    sparse = moe.block_indices(model.layers)
    yield Part("model.embed_tokens.weight", "embedding.weight")
    for layer in range(model.layers):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        for ours, theirs in (PLAIN if model.qk_norm == "none" else PLAIN | QK_NORMS).items():
            yield Part(f"{there}.{theirs}", f"{here}.{ours}")
        if layer in sparse:
            yield from _experts(format_, f"{there}.{format_.layer}", f"{here}.moe", moe.experts)
        else:
            yield from _dense(f"{there}.mlp", f"{here}.feed_forward")
    yield Part("model.norm.weight", "norm.weight")
    if not model.tie_embeddings:
        yield Part("lm_head.weight", "head.weight")


def _experts(format_: Format, there: str, here: str, experts: int) -> Iterator[Part]:
    gate, up, down = format_.matrices
    yield Part(f"{there}.gate.weight", f"{here}.router.weight")
    for expert in range(experts):
        prefix = f"{there}.experts.{expert}"
        yield Part(f"{prefix}.{gate}.weight", f"{here}.experts.w_gate_up", expert, half=0)
        yield Part(f"{prefix}.{up}.weight", f"{here}.experts.w_gate_up", expert, half=1)
        yield Part(f"{prefix}.{down}.weight", f"{here}.experts.w_down", expert)


def _dense(there: str, here: str) -> Iterator[Part]:
    for half, theirs in enumerate(PROJECTIONS[:2]):
        yield Part(f"{there}.{theirs}.weight", f"{here}.w_gate_up.weight", half=half)
    yield Part(f"{there}.{PROJECTIONS[2]}.weight", f"{here}.w_down.weight")
