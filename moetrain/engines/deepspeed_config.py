"""What DeepSpeed is told: our configuration, and the user's JSON where the two do not meet.

A key of the JSON that our configuration decides too must agree with it or be "auto"; all that do
not are listed at once. Keys that cannot work here are refused with the reason; others pass through.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.precision import computes_in

FIELD = "engine.deepspeed_config"
BUCKET = 500_000_000
"""Elements that DeepSpeed reduces at once, at most, unless the user says otherwise."""
AUTO = "auto"
ABSENT = object()


class Ours(NamedTuple):
    """What a key of the JSON must be, and the field that says so."""

    field: str
    value: Any
    """Of the field."""
    key_value: Any
    """Of the key."""


def settings(config: Config, world_size: int) -> dict[str, Any]:
    """What DeepSpeed gets in a run; raises UserError, with one line per problem."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "engine.kind (deepspeed) needs the package deepspeed, which is not installed; "
            "pip install deepspeed, or set engine.kind to torch"
        )
    path = config.engine.deepspeed_config
    return merge(config, world_size, {} if path is None else read(path))


def read(path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)
    except OSError as error:
        raise UserError(
            f"{FIELD} ({path}) cannot be read: {error.strerror}; name a JSON file"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{FIELD} ({path}) is not JSON in UTF-8: {error}") from None
    except KeyError as repeated:
        raise UserError(
            f"{FIELD} ({path}): {repeated.args[0]} is given twice; keep one of the two"
        ) from None
    if not isinstance(given, dict):
        raise UserError(f"{FIELD} ({path}) must hold an object {{...}}, not {_spell(given)}")
    return given


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise KeyError(key)
        found[key] = value
    return found


def merge(config: Config, world_size: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings for a configuration under a user's JSON.

    Raises UserError that lists every contradiction and every key that cannot work.
    """
    problems = list(_misshapen(given))
    if not problems:
        problems = [*_contradictions(config, world_size, given), *_refusals(given)]
    if problems:
        file = config.engine.deepspeed_config
        raise UserError("\n".join([f"{FIELD} ({file}) does not go with this run:", *problems]))
    kept = _without_auto({key: value for key, value in given.items() if key not in _DECIDED})
    zero = {**kept.get("zero_optimization", {}), "stage": config.engine.zero_stage}
    return {
        **kept,
        "train_batch_size": config.train.global_batch,
        "train_micro_batch_size_per_gpu": config.train.micro_batch,
        "gradient_accumulation_steps": config.accumulation(world_size),
        "gradient_clipping": 0.0,  # the engine clips
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # AdamW of torch on the CPU, too
    }


def bucket_size(config: Config, world_size: int, numel: int) -> int:
    """Elements that are reduced at once, of `numel`; at stage 0 nobody can set it."""
    zero = settings(config, world_size)["zero_optimization"]
    given = zero.get("reduce_bucket_size", min(numel, BUCKET))
    return BUCKET if config.engine.zero_stage == 0 else int(given)


_DECIDED = ("optimizer", "bf16", "bfloat16", "fp16", "amp", "torch_autocast", "data_types")
"""Sections that the engine stands for: DeepSpeed sees fp32 weights and a finished optimizer."""
_SECTIONS = ("optimizer", "optimizer.params", "bf16", "bfloat16", "zero_optimization")


def _misshapen(given: Mapping[str, Any]) -> Iterator[str]:
    for section in _SECTIONS:
        value = _at(given, section)
        if value not in (ABSENT, AUTO) and not isinstance(value, dict):
            yield f"  {section} ({_spell(value)}) must be a section {{...}}"


def _at(given: Any, path: str) -> Any:
    """The value at a dotted path; ABSENT where there is none."""
    for key in path.split("."):
        if not isinstance(given, Mapping) or key not in given:
            return ABSENT
        given = given[key]
    return given


def _without_auto(section: Mapping[str, Any]) -> dict[str, Any]:
    """Without the keys that are left to us where we leave them to DeepSpeed."""
    return {
        key: _without_auto(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != AUTO
    }


# ---- what both decide ----------------------------------------------------------------------------


def ours(config: Config, world_size: int) -> dict[str, Ours]:
    """Keys of DeepSpeed's JSON that are fields of ours."""
    train, engine = config.train, config.engine
    steps = config.accumulation(world_size)
    accumulated = "train.global_batch / (train.micro_batch × world size)"
    is_bf16 = computes_in(engine) == "bf16"
    betas = [train.beta1, train.beta2]
    same = {
        "train_batch_size": ("train.global_batch", train.global_batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch", train.micro_batch),
        "gradient_accumulation_steps": (accumulated, steps),
        "gradient_clipping": ("train.clip_norm", train.clip_norm),
        "zero_optimization.stage": ("engine.zero_stage", engine.zero_stage),
        "optimizer.params.lr": ("train.lr", train.lr),
        "optimizer.params.betas": ("[train.beta1, train.beta2]", betas),
        "optimizer.params.eps": ("train.adam_eps", train.adam_eps),
        "optimizer.params.weight_decay": ("train.weight_decay", train.weight_decay),
    }
    return {
        **{key: Ours(field, value, value) for key, (field, value) in same.items()},
        "bf16.enabled": Ours("engine.precision", computes_in(engine), is_bf16),
        "bfloat16.enabled": Ours("engine.precision", computes_in(engine), is_bf16),
        "fp16.enabled": Ours("engine.precision", computes_in(engine), False),
        "amp.enabled": Ours("engine.precision", computes_in(engine), False),
        "torch_autocast.enabled": Ours("engine.precision", computes_in(engine), False),
    }


def _contradictions(config: Config, world_size: int, given: Mapping[str, Any]) -> Iterator[str]:
    for key, (field, value, wanted) in ours(config, world_size).items():
        found = _at(given, key)
        if found in (ABSENT, AUTO) or _equal(found, wanted):
            continue
        if key == "zero_optimization.stage" and found == 3:
            yield f"  {key} (3): {STAGE_3}"
            continue
        yield (
            f"  {key} ({_spell(found)}) contradicts {field} ({_spell(value)}); "
            f'set it to {_spell(wanted)} or "auto", or change {field.strip("[]")}'
        )


def _equal(found: Any, wanted: Any) -> bool:
    return isinstance(found, bool) == isinstance(wanted, bool) and found == wanted


def _spell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


STAGE_3 = (
    "ZeRO stage 3 cuts weights, too, but DeepSpeed refuses expert layers there other than those it "
    "makes itself (AutoEP); use stage 0, 1 or 2, or engine.kind torch, which shards weights"
)

# ---- what cannot work ----------------------------------------------------------------------------

_OF_OURS = "is what {} is for; leave it out"
_UNKNOWN_TO_US = "changes the model or its training behind moetrain's back; leave it out"
_SECTIONS_REFUSED = {
    "scheduler": _OF_OURS.format("train.schedule"),
    "activation_checkpointing": "has no effect on moetrain's model; leave it out",
    "checkpoint": _OF_OURS.format("the section checkpoint of moetrain"),
    "nebula": _OF_OURS.format("the section checkpoint of moetrain"),
    "datastates_ckpt": _OF_OURS.format("the section checkpoint of moetrain"),
    "wandb": _OF_OURS.format("log.wandb"),
    "pipeline": "needs a pipeline of modules, which moetrain's model is not; leave it out",
    "tensor_parallel": "splits layers, which moetrain's are not written for; leave it out",
    "expert_parallel": _OF_OURS.format("parallel.ep"),
    "sequence_parallel_size": "splits sequences, which moetrain does not; leave it out",
    "elasticity": "changes batch sizes; leave it out, and resume on another number of ranks",
    "autotuning": "starts runs of its own; leave it out",
    "hybrid_engine": _UNKNOWN_TO_US,
    "compile": _UNKNOWN_TO_US,
    "curriculum_learning": _UNKNOWN_TO_US,
    "data_efficiency": _UNKNOWN_TO_US,
    "progressive_layer_drop": _UNKNOWN_TO_US,
    "compression_training": _UNKNOWN_TO_US,
    "weight_quantization": _UNKNOWN_TO_US,
    "quantize_training": _UNKNOWN_TO_US,
    "eigenvalue": _UNKNOWN_TO_US,
    "zero_optimization.offload_param": "is for ZeRO stage 3; leave it out",
    "zero_optimization.zenflow": _UNKNOWN_TO_US,
}
"""Refused unless empty, false, "auto" or not enabled."""

_SUMS = "the engine turns its mean into a sum; leave it out"
_EXPERTS = "DeepSpeed reduces experts' gradients no other way; leave it out"
_VALUES_REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "gradient_allreduce_op": (lambda v: v == "mean", _SUMS),
    "managed_gradient_accumulation": (lambda v: v is True, "the engine names the last micro-batch"),
    "sparse_gradients": (lambda v: v is False, "moetrain's gradients are dense; leave it out"),
    "use_data_before_expert_parallelism": (
        lambda v: v is False,
        "the ranks of an expert group are adjacent (moetrain.mesh); leave it out",
    ),
    "zero_optimization.reduce_scatter": (lambda v: v is True, _EXPERTS),
    "zero_optimization.contiguous_gradients": (lambda v: v is True, _EXPERTS),
    "zero_optimization.offload_optimizer.device": (
        lambda v: v in ("none", "cpu"),
        "the optimizer's state must be in memory to be saved; set it to cpu or none",
    ),
    "zero_optimization.offload_optimizer.ratio": (
        lambda v: v == 1,
        "is for ZeRO stage 3; leave it out",
    ),
    "communication_data_type": (
        lambda v: v == "fp32",
        "gradients are summed in fp32; leave it out",
    ),
    "data_types.grad_accum_dtype": (lambda v: v == "fp32", "gradients are fp32; leave it out"),
    "optimizer.type": (
        lambda v: isinstance(v, str) and v.lower() == "adamw",
        'moetrain trains with AdamW; set it to AdamW or "auto"',
    ),
    "optimizer.params.adam_w_mode": (lambda v: v is True, "moetrain trains with AdamW"),
    "optimizer.params.bias_correction": (lambda v: v is True, "moetrain's AdamW corrects it"),
    "optimizer.params.amsgrad": (lambda v: v is False, "moetrain's AdamW is the plain one"),
}
"""What a value must be where it is given."""
_STAGE_3_ONLY = {
    "sub_group_size", "prefetch_bucket_size", "param_persistence_threshold",
    "model_persistence_threshold", "max_live_parameters", "max_reuse_distance",
    "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential", "zero_hpz_partition_size",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients",
    "memory_efficient_linear", "log_trace_cache_warnings", "leaf_module",
}  # fmt: skip
"""Keys of zero_optimization without effect at other stages; so are those that begin stage3_."""
_PARAMS = ("lr", "betas", "eps", "weight_decay", "adam_w_mode", "bias_correction", "amsgrad")
_IMPLEMENTATIONS = ("torch_adam", "fused", "foreach")


def _refusals(given: Mapping[str, Any]) -> Iterator[str]:
    for section, reason in _SECTIONS_REFUSED.items():
        if _is_on(_at(given, section)):
            yield f"  {section} {reason}"
    for key, (is_legal, reason) in _VALUES_REFUSED.items():
        found = _at(given, key)
        if found not in (ABSENT, AUTO) and not is_legal(found):
            yield f"  {key} ({_spell(found)}) cannot be: {reason}"
    zero = _at(given, "zero_optimization")
    for name, value in zero.items() if isinstance(zero, Mapping) else ():
        if value != AUTO and (name in _STAGE_3_ONLY or name.startswith("stage3_")):
            yield f"  zero_optimization.{name} ({_spell(value)}) is for ZeRO stage 3; leave it out"
    params = _at(given, "optimizer.params")
    for name in params if isinstance(params, Mapping) else ():
        if name not in (*_PARAMS, *_IMPLEMENTATIONS):
            yield f"  optimizer.params.{name} is no parameter of AdamW here; leave it out"


def _is_on(section: Any) -> bool:
    """Whether a section does anything, as far as one can see from outside."""
    if section in (ABSENT, AUTO, None, False, {}) or section == 1:
        return False
    if not isinstance(section, Mapping):
        return True
    values = [value for key, value in section.items() if value != AUTO]
    return section.get("enabled", True) is not False and bool(values)
