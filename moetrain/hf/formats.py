"""Hugging Face's formats of mixture-of-experts models: their settings, and the names of tensors.

Names are those of published checkpoints, one tensor for each matrix of an expert, which
transformers, vLLM and others read. Checked against transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

from torch import Tensor

from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.hf.names import CARRIED, FormatName


class Format(NamedTuple):
    """What a format calls things, and what it is fixed to."""

    architecture: str
    """The class of transformers."""
    layer: str
    """The module of experts, in a block."""
    matrices: tuple[str, str, str]
    """An expert's gate, up and down projection."""
    qk_norm: Literal["none", "head", "full"]
    always_renormalizes: bool = False
    """Whether gates add up to 1 always."""
    has_head_dim: bool = True
    """Whether heads may be of another width than dim/heads."""
    has_dense_blocks: bool = False
    """Whether some blocks may have no experts."""
    norm_eps: float = 1e-5
    """Where config.json does not say."""


PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FORMATS: dict[FormatName, Format] = {
    "mixtral": Format("MixtralForCausalLM", "block_sparse_moe", ("w1", "w3", "w2"), "none", True),
    "olmoe": Format("OlmoeForCausalLM", "mlp", PROJECTIONS, "full", has_head_dim=False),
    "qwen3_moe": Format(
        "Qwen3MoeForCausalLM", "mlp", PROJECTIONS, "head", has_dense_blocks=True, norm_eps=1e-6
    ),
}
ROUTERS = ("topk", "switch", "gshard")
"""Gates that are a top-k of a softmax where nothing is drawn."""


def renormalizes(config: Config) -> bool:
    """Whether the gates of a token's choices are divided by their sum."""
    moe = config.moe
    return moe.router == "gshard" or (moe.router == "topk" and moe.renormalize)


def refusals(name: FormatName, config: Config) -> list[str]:
    """Why the format cannot express a model, if it cannot."""
    format_, model, moe = FORMATS[name], config.model, config.moe
    blocks = moe.block_indices(model.layers)
    if not moe.experts:
        return [f"{name}: moe.experts (0) must be 1 or more"]
    checks = {
        f"moe.router ({moe.router}) must be one of {', '.join(ROUTERS)}": moe.router in ROUTERS,
        f"moe.renormalize (false, as {moe.router} has it) must be true": (
            renormalizes(config) or not format_.always_renormalizes or moe.router not in ROUTERS
        ),
        f"model.qk_norm ({model.qk_norm}) must be {format_.qk_norm}": (
            model.qk_norm == format_.qk_norm
        ),
        f"moe.shared_experts ({moe.shared_experts}) must be 0": moe.shared_experts == 0,
        f"model.head_dim ({model.head_dim}) must be dim/heads": (
            format_.has_head_dim or model.attention_head_dim * model.heads == model.dim
        ),
        f"moe.every ({moe.every}) and moe.first_dense ({moe.first_dense}) must leave no block "
        "without experts": format_.has_dense_blocks or len(blocks) == model.layers,
    }
    return [f"{name}: {what}" for what, holds in checks.items() if not holds]


def approximations(config: Config) -> list[str]:
    """What is left out of what the model does in training and evaluation."""
    moe, found = config.moe, []
    factors = {
        "moe.capacity_factor": moe.capacity_factor,
        "moe.eval_capacity_factor": moe.eval_capacity_factor,
    }
    for setting, factor in factors.items():
        if factor is not None:
            found.append(f"{setting} ({factor}) drops assignments; there, none is dropped")
    if moe.router == "gshard" and moe.random_second:
        found.append(
            "moe.random_second (true) leaves out second experts in training; there, both are used"
        )
    return found


def settings_of(
    name: FormatName,
    config: Config,
    vocab_size: int,
    eos_id: int | None,
    source: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The content of config.json; `vocab_size` is the embedding's.

    `source` is the one of the model that this one was imported from, if any.
    """
    format_, model, moe = FORMATS[name], config.model, config.moe
    found = {
        "architectures": [format_.architecture],
        "model_type": name,
        "vocab_size": vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.num_kv_heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "max_position_embeddings": config.data.seq_len,
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        "num_experts_per_tok": moe.top_k,
        # Theirs is K at perfect balance, ours 1.
        "router_aux_loss_coef": moe.balance_coef / moe.top_k,
        "use_cache": True,
    }
    if source is not None:
        found |= {key: source[key] for key in CARRIED if key in source}
        longest = max(source["max_position_embeddings"], config.data.seq_len)
        found["max_position_embeddings"] = longest
    if format_.has_head_dim:
        found["head_dim"] = model.attention_head_dim
    if name == "mixtral":
        return found | {
            "num_local_experts": moe.experts,
            "intermediate_size": config.expert_ffn_dim,
            "sliding_window": None,
        }
    found |= {"num_experts": moe.experts, "norm_topk_prob": renormalizes(config)}
    if name == "olmoe":
        return found | {"intermediate_size": config.expert_ffn_dim, "clip_qkv": None}
    return found | {
        "moe_intermediate_size": config.expert_ffn_dim,
        "intermediate_size": model.dense_ffn_dim,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(range(moe.first_dense)),
        "use_sliding_window": False,
        "sliding_window": None,
    }


# ---- from theirs ---------------------------------------------------------------------------------


def format_of(described: Mapping[str, Any], where: str) -> FormatName:
    """The format of a config.json; UserError where it is none of these."""
    for name in FORMATS:
        if described.get("model_type") == name:
            return name
    raise UserError(
        f"{where}: model_type ({described.get('model_type')}) must be one of {', '.join(FORMATS)}; "
        "other models are not read"
    )


def sections_of(name: FormatName, described: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Our settings for a config.json, by section.

    Raises UserError where it lacks something, or asks for what cannot be done here.
    """
    format_, is_mixtral = FORMATS[name], name == "mixtral"
    experts = "num_local_experts" if "num_local_experts" in described else "num_experts"
    width = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    found = {"rms_norm_eps": format_.norm_eps, **described}
    found |= {"rope_theta": found.get("rope_theta"), **(found.get("rope_scaling") or {})}
    found |= found.get("rope_parameters") or {}
    if wrong := [key for key in (*NEEDED, experts, width) if not _is_number(found.get(key))]:
        told = ", ".join(f"{key} ({found.get(key)})" for key in wrong)
        raise UserError(f"config.json: {told} must be a number above 0")
    _require_plain(name, found)
    layers, top_k = found["num_hidden_layers"], found["num_experts_per_tok"]
    model = {
        "dim": found["hidden_size"],
        "layers": layers,
        "heads": found["num_attention_heads"],
        "kv_heads": found.get("num_key_value_heads"),
        "head_dim": found.get("head_dim") if format_.has_head_dim else None,
        "ffn_dim": found.get("intermediate_size") if format_.has_dense_blocks else None,
        "vocab_size": found["vocab_size"],
        "qk_norm": format_.qk_norm,
        "tie_embeddings": bool(found.get("tie_word_embeddings", False)),
        "rope_theta": found["rope_theta"],
        "norm_eps": found["rms_norm_eps"],
    }
    moe = {
        "router": "topk",
        "experts": found[experts],
        "top_k": top_k,
        "renormalize": is_mixtral or bool(found.get("norm_topk_prob", False)),
        "expert_ffn_dim": found[width],
        "capacity_factor": None,
        "eval_capacity_factor": None,
        "balance_coef": top_k * (found.get("router_aux_loss_coef") or 0.0),
        "z_loss_coef": 0.0,
    }
    if format_.has_dense_blocks:
        moe |= _dense_blocks(found, layers)
    return {
        "model": model,
        "moe": moe,
        "data": {"seq_len": found["max_position_embeddings"]},
        "train": {"micro_batch": 1},  # of sequences as long as that
    }


NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_experts_per_tok",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)
"""Of every config.json, as numbers."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _require_plain(name: FormatName, found: Mapping[str, Any]) -> None:
    kind = found.get("rope_type", found.get("type", "default"))
    window = found.get("sliding_window") if found.get("use_sliding_window", True) else None
    reaches_all = window is None or window >= found["max_position_embeddings"]
    checks = {
        "quantization_config must not be there: its tensors are not plain numbers": (
            found.get("quantization_config") is None
        ),
        f"hidden_act ({found.get('hidden_act')}) must be silu": (
            found.get("hidden_act", "silu") == "silu"
        ),
        "attention_bias (true) must be false": not found.get("attention_bias"),
        f"sliding_window ({window}) must be null": reaches_all,
        f"clip_qkv ({found.get('clip_qkv')}) must be null": found.get("clip_qkv") is None,
        f"rope_type ({kind}) must be default": kind == "default",
        f"partial_rotary_factor ({found.get('partial_rotary_factor')}) must be 1": (
            found.get("partial_rotary_factor", 1) == 1
        ),
    }
    if problems := [f"{name}: {what}" for what, holds in checks.items() if not holds]:
        told = "\n".join(problems)
        raise UserError(f"{told}\nmodels that compute otherwise cannot be imported")


def _dense_blocks(found: Mapping[str, Any], layers: int) -> dict[str, int]:
    """Ours for blocks without experts: every n-th has some, but the first few."""
    every, dense = found.get("decoder_sparse_step") or 1, set(found.get("mlp_only_layers") or ())
    first = next((layer for layer in range(layers) if layer not in dense), layers)
    sparse = {layer for layer in range(layers) if (layer + 1) % every == 0}
    if sparse - dense != {layer for layer in sparse if layer >= first}:
        raise UserError(
            f"mlp_only_layers ({sorted(dense)}) must be the first ones: blocks with experts are "
            "every n-th from some block on"
        )
    return {"every": every, "first_dense": first}


# ---- tensors -------------------------------------------------------------------------------------


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
