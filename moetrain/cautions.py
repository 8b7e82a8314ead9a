"""What is legal but hardly meant: settings without effect, and routers that cannot learn.

Pure functions over a `moetrain.config.Config`; `moetrain.constraints` holds what is not legal.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moetrain.constraints import (
    BALANCED_BY_DESIGN,
    ROUTERS_OF_FIELD,
    WITHOUT_WEIGHTS,
    experts_to_spill_to,
    one_gate_is_all,
    spell,
)

if TYPE_CHECKING:
    from moetrain.config import Config, MoEConfig


def cautions(config: Config) -> list[str]:
    """What is legal but hardly meant: settings without effect, and a router that cannot learn."""
    found = []
    for field, reason in _idle_settings(config):
        section, name = field.split(".")
        settings = getattr(config, section)
        value = getattr(settings, name)
        if value != type(settings).model_fields[name].default:
            found.append(f"{field} ({spell(value)}) has no effect {reason}")
    return found + list(_doubtful(config))


def _idle_settings(config: Config) -> Iterator[tuple[str, str]]:
    moe, source = config.moe, config.data.source
    if moe.experts == 0:
        yield "train.freeze", "when moe.experts is 0"
        yield "log.trace", "when moe.experts is 0: nothing is routed"
        idle = set(type(moe).model_fields) - {"experts"}
        yield from ((f"moe.{field}", "when moe.experts is 0") for field in sorted(idle))
    else:
        yield from _idle_moe_settings(moe)
        yield from _idle_dispatch_settings(config)
        if config.train.freeze == ("router",) and moe.router in WITHOUT_WEIGHTS:
            yield "train.freeze", f"with moe.router {moe.router}, which has no weights"
        if "router" in config.train.freeze and moe.router == "sigmoid":
            yield "moe.bias_update_rate", "when train.freeze has the router"
    if source == "stdlib" or Path(source).expanduser().exists():
        for field in ("data.subset", "data.split", "data.streaming"):
            yield field, f"for the local data.source {source}"
    if config.data.format != "chat":
        yield "data.chat_template", f"with data.format {config.data.format}; only chat reads it"
    if config.data.packing == "whole":
        yield "data.mask_documents", "with data.packing whole: no document sees another anyway"
    if source == "stdlib":
        yield "data.field", "for data.source stdlib"
    if config.engine.kind != "deepspeed":
        for field in ("engine.zero_stage", "engine.deepspeed_config"):
            yield field, f"with engine.kind {config.engine.kind}; only deepspeed reads it"
    if config.train.spike_sigmas == 0:
        yield "train.spike_response", "when train.spike_sigmas is 0: no step is a spike"
    if config.train.schedule != "wsd":
        yield "train.decay_fraction", f"with train.schedule {config.train.schedule}"
    if config.checkpoint.every == 0:
        yield "checkpoint.keep", "when checkpoint.every is 0 (never)"
    if config.log.every == 0:
        yield "log.trace", "when log.every is 0 (never)"
    if config.log.wandb == "off":
        yield "log.wandb_project", "when log.wandb is off"
        yield "log.wandb_artifacts", "when log.wandb is off"
    elif config.checkpoint.every == 0:
        yield "log.wandb_artifacts", "when checkpoint.every is 0 (never)"


def _idle_moe_settings(moe: MoEConfig) -> Iterator[tuple[str, str]]:
    for field, routers in ROUTERS_OF_FIELD.items():
        if moe.router not in routers:
            verb = "reads" if len(routers) == 1 else "read"
            yield field, f"with moe.router {moe.router}; only {' and '.join(routers)} {verb} it"
    if moe.router in BALANCED_BY_DESIGN:
        reason = f"with moe.router {moe.router}, which no loss can balance"
        yield "moe.balance_coef", reason
        yield "moe.balance_scope", reason
    elif moe.balance_coef == 0:
        yield "moe.balance_scope", "when moe.balance_coef is 0"
    if moe.router in WITHOUT_WEIGHTS:
        yield "moe.z_loss_coef", f"with moe.router {moe.router}, which has no weights"
    if moe.capacity_factor is None and moe.eval_capacity_factor is None:
        for field in ("moe.min_capacity", "moe.drop_policy", "moe.spill_depth"):
            yield field, "when both capacity factors are null (dropless)"
    elif moe.drop_policy == "random" and moe.capacity_factor is None:
        yield (
            "moe.drop_policy",
            ("when moe.capacity_factor is null (dropless): outside training it is position"),
        )
    if moe.capacity_factor != "auto":
        factor = spell(moe.capacity_factor)
        yield "moe.target_drop_rate", f"with moe.capacity_factor {factor}; only auto reads it"
    if moe.drop_policy != "spill":
        yield "moe.spill_depth", f"with moe.drop_policy {moe.drop_policy}; only spill reads it"
    elif moe.spill_depth > (most := experts_to_spill_to(moe)):
        yield "moe.spill_depth", f"beyond the {most} experts that a token has not chosen"
    if moe.shared_experts == 0:
        yield "moe.shared_gate", "when moe.shared_experts is 0"


def _idle_dispatch_settings(config: Config) -> Iterator[tuple[str, str]]:
    parallel = config.parallel
    if parallel.ep == 1:
        for field in ("dispatch", "overlap_chunks", "nodes"):
            yield f"parallel.{field}", "when parallel.ep is 1: tokens stay where they are"
    elif parallel.dispatch != "two_level":
        yield (
            "parallel.nodes",
            f"with parallel.dispatch {parallel.dispatch}; only two_level reads it",
        )


def _doubtful(config: Config) -> Iterator[str]:
    moe, train = config.moe, config.train
    if moe.experts > 1:
        yield from _gates_that_teach_nothing(moe)
    if moe.router == "expert_choice" and moe.eval_capacity_factor != moe.capacity_factor:
        yield (
            f"moe.eval_capacity_factor ({moe.eval_capacity_factor}) gives a token another number "
            f"of experts in evaluation than moe.capacity_factor ({moe.capacity_factor}) does in "
            "training, since moe.router expert_choice has no other limit; set them equal"
        )
    if config.parallel.dispatch == "two_level" and config.parallel.nodes == config.parallel.ep > 1:
        yield (
            f"parallel.nodes ({config.parallel.nodes}) puts every rank that shares experts on a "
            "node of its own, so parallel.dispatch two_level has nobody to meet inside a node; "
            "set parallel.dispatch to all_to_all"
        )
    if train.warmup_steps >= train.steps:
        yield (
            f"train.warmup_steps ({train.warmup_steps}) lasts for all train.steps "
            f"({train.steps}), so the learning rate never falls again"
        )


def _gates_that_teach_nothing(moe: MoEConfig) -> Iterator[str]:
    """Gates that are constant, so that the cross-entropy has no gradient by them."""
    blind = "so {} learns from the auxiliary losses alone; "
    if one_gate_is_all(moe) and moe.router in ("noisy_topk", "sigmoid"):
        yield (
            f"moe.top_k (1) makes every gate of moe.router {moe.router} the same, "
            f"{blind.format('the router')}set moe.top_k to 2, or moe.router to switch"
        )
    elif one_gate_is_all(moe):
        yield (
            "moe.renormalize (true) with moe.top_k 1 makes every gate 1, "
            f"{blind.format('the router')}set moe.renormalize to false"
        )
    elif moe.router == "hierarchical" and moe.renormalize and moe.top_groups in (1, moe.top_k):
        level = "over groups" if moe.top_groups == 1 else "inside a group"
        yield (
            f"moe.renormalize (true) with moe.top_groups {moe.top_groups} and moe.top_k "
            f"{moe.top_k} makes every gate {level} 1, {blind.format('the router ' + level)}"
            "set moe.renormalize to false"
        )
