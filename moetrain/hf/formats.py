"""Hugging Face's formats of models with experts, and of dense ones: their settings, and ours.

Checked against transformers 5.24.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.hf.names import CARRIED, FormatName

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Format(NamedTuple):
    """What a format calls things, and what it is fixed to."""

    architecture: str
    """The class of transformers."""
    qk_norm: Literal["none", "head", "full"] = "none"
    layer: str = "mlp"
    """The module of experts, in a block."""
    matrices: tuple[str, str, str] = PROJECTIONS
    """An expert's gate, up and down projection."""
    has_experts: bool = True
    always_renormalizes: bool = False
    """Whether gates add up to 1 always."""
    has_head_dim: bool = True
    """Whether heads may be of another width than dim/heads."""
    has_dense_blocks: bool = False
    """Whether some blocks may have no experts."""
    norm_eps: float = 1e-5
    """Where config.json does not say."""


FORMATS: dict[FormatName, Format] = {
    "mixtral": Format(
        "MixtralForCausalLM",
        layer="block_sparse_moe",
        matrices=("w1", "w3", "w2"),
        always_renormalizes=True,
    ),
    "olmoe": Format("OlmoeForCausalLM", "full", has_head_dim=False),
    "qwen3_moe": Format("Qwen3MoeForCausalLM", "head", has_dense_blocks=True, norm_eps=1e-6),
    "llama": Format("LlamaForCausalLM", has_experts=False, norm_eps=1e-6),
    "mistral": Format("MistralForCausalLM", has_experts=False, norm_eps=1e-6),
    "qwen3": Format("Qwen3ForCausalLM", "head", has_experts=False, norm_eps=1e-6),
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
    if format_.has_experts and not moe.experts:
        return [f"{name}: moe.experts (0) must be 1 or more"]
    if not format_.has_experts and moe.experts:
        return [f"{name}: moe.experts ({moe.experts}) must be 0"]
    checks = {
        f"model.qk_norm ({model.qk_norm}) must be {format_.qk_norm}": (
            model.qk_norm == format_.qk_norm
        ),
        f"model.head_dim ({model.head_dim}) must be dim/heads": (
            format_.has_head_dim or model.attention_head_dim * model.heads == model.dim
        ),
    }
    if moe.experts:
        is_known, blocks = moe.router in ROUTERS, moe.block_indices(model.layers)
        checks |= {
            f"moe.router ({moe.router}) must be one of {', '.join(ROUTERS)}": is_known,
            f"moe.renormalize (false, as {moe.router} has it) must be true": (
                renormalizes(config) or not format_.always_renormalizes or not is_known
            ),
            f"moe.shared_experts ({moe.shared_experts}) must be 0": moe.shared_experts == 0,
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
    if not moe.experts:
        return []
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
    format_, model = FORMATS[name], config.model
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
        "use_cache": True,
    }
    if source is not None:
        found |= {key: source[key] for key in CARRIED if key in source}
        longest = max(source["max_position_embeddings"], config.data.seq_len)
        found["max_position_embeddings"] = longest
    if format_.has_head_dim:
        found["head_dim"] = model.attention_head_dim
    if name in ("mixtral", "mistral", "qwen3", "qwen3_moe"):
        found["sliding_window"] = None
    if name.startswith("qwen3"):
        found["use_sliding_window"] = False
    if not format_.has_experts:
        return {**found, "intermediate_size": model.dense_ffn_dim}
    return found | _experts_of(name, config)


def _experts_of(name: FormatName, config: Config) -> dict[str, Any]:
    """The part of config.json that is about experts."""
    moe, width = config.moe, config.expert_ffn_dim
    found = {
        "num_experts_per_tok": moe.top_k,
        # Theirs is K at perfect balance, ours 1.
        "router_aux_loss_coef": moe.balance_coef / moe.top_k,
    }
    if name == "mixtral":
        return {**found, "num_local_experts": moe.experts, "intermediate_size": width}
    found |= {"num_experts": moe.experts, "norm_topk_prob": renormalizes(config)}
    if name == "olmoe":
        return {**found, "intermediate_size": width, "clip_qkv": None}
    return {
        **found,
        "moe_intermediate_size": width,
        "intermediate_size": config.model.dense_ffn_dim,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(range(moe.first_dense)),
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
    format_ = FORMATS[name]
    found = {"rms_norm_eps": format_.norm_eps, **described}
    found |= {"rope_theta": found.get("rope_theta"), **(found.get("rope_scaling") or {})}
    found |= found.get("rope_parameters") or {}
    _require_numbers(NEEDED, found)
    _require_plain(name, found)
    if not format_.has_experts or format_.has_dense_blocks:
        _require_numbers(["intermediate_size"], found)
        ffn_dim = found["intermediate_size"]
    else:
        ffn_dim = None
    model = {
        "dim": found["hidden_size"],
        "layers": found["num_hidden_layers"],
        "heads": found["num_attention_heads"],
        "kv_heads": found.get("num_key_value_heads"),
        "head_dim": found.get("head_dim") if format_.has_head_dim else None,
        "ffn_dim": ffn_dim,
        "vocab_size": found["vocab_size"],
        "qk_norm": format_.qk_norm,
        "tie_embeddings": bool(found.get("tie_word_embeddings", False)),
        "rope_theta": found["rope_theta"],
        "norm_eps": found["rms_norm_eps"],
    }
    return {
        "model": model,
        "moe": _moe(name, found) if format_.has_experts else {"experts": 0},
        "data": {"seq_len": found["max_position_embeddings"]},
        "train": {"micro_batch": 1},  # of sequences as long as that
    }


def _moe(name: FormatName, found: Mapping[str, Any]) -> dict[str, Any]:
    """Our section of that name; nothing is dropped, and the routers' z-loss is theirs: none."""
    format_ = FORMATS[name]
    experts = "num_local_experts" if "num_local_experts" in found else "num_experts"
    width = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    _require_numbers([experts, "num_experts_per_tok", width], found)
    dense = _dense_blocks(found) if format_.has_dense_blocks else {}
    return {
        "router": "topk",
        "experts": found[experts],
        "top_k": found["num_experts_per_tok"],
        "renormalize": format_.always_renormalizes or bool(found.get("norm_topk_prob", False)),
        "expert_ffn_dim": found[width],
        "capacity_factor": None,
        "eval_capacity_factor": None,
        "balance_coef": found["num_experts_per_tok"] * (found.get("router_aux_loss_coef") or 0.0),
        "z_loss_coef": 0.0,
        **dense,
    }


NEEDED = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
    "rms_norm_eps",
    "rope_theta",
    "max_position_embeddings",
)
"""Of every config.json, as numbers."""


def _require_numbers(keys: Iterable[str], found: Mapping[str, Any]) -> None:
    def is_number(value: object) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and value > 0

    if wrong := [f"{key} ({found.get(key)})" for key in keys if not is_number(found.get(key))]:
        raise UserError(f"config.json: {', '.join(wrong)} must be a number above 0")


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
        "mlp_bias (true) must be false": not found.get("mlp_bias"),
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


def _dense_blocks(found: Mapping[str, Any]) -> dict[str, int]:
    """Ours for blocks without experts: every n-th has some, but the first few."""
    layers = found["num_hidden_layers"]
    every, dense = found.get("decoder_sparse_step") or 1, set(found.get("mlp_only_layers") or ())
    first = next((layer for layer in range(layers) if layer not in dense), layers)
    sparse = {layer for layer in range(layers) if (layer + 1) % every == 0}
    if sparse - dense != {layer for layer in sparse if layer >= first}:
        raise UserError(
            f"mlp_only_layers ({sorted(dense)}) must be the first ones: blocks with experts are "
            "every n-th from some block on"
        )
    return {"every": every, "first_dense": first}
