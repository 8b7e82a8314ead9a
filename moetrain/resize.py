"""What `moetrain split` and `moetrain merge` do: give a trained model another number of experts.

A model with n times the experts, n times the choices and equal logits for the n that one expert
became chooses all of them where it chose that expert, each with an n-th of its gate. So an expert
cut into n finer ones (the fine-grained experts of 2401.06066, and the virtual groups in which
2410.07524 upcycles), with n times the output, gives what it gave; and so do n copies of it.
Merging is the opposite: exact for experts that were split, an approximation for any others.

Shape suffixes: E experts, n parts of each, D model width, F expert hidden width, f = F/n.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from moetrain import restore, settings
from moetrain.checkpoint.reading import open_checkpoint, read_tensor
from moetrain.config import Config, MoEConfig
from moetrain.constraints import divisors, nearest, spell
from moetrain.errors import UserError
from moetrain.hf.importing import Opened, write
from moetrain.hf.names import KEPT

SplitBy = Literal["cut", "copy"]
MergeBy = Literal["join", "average"]
Make = Callable[[str], Tensor]
"""Makes a parameter or buffer of a model, by its name."""

RENORMALIZES = {"switch": False, "gshard": True}
"""Gates with a fixed number of choices; with another number they are topk."""
ROUTERS = (*RENORMALIZES, "topk", "noisy_topk", "sigmoid", "dense")
"""Those that choose by logits which parts of an expert can share."""


def split(path: Path, out: Path, parts: int, by: SplitBy, top_k: int | None = None) -> list[str]:
    """Write a model whose experts are `parts` times as many, of the checkpoint `path` names.

    `cut` makes them as many times narrower, `copy` leaves their width. A token chooses `parts`
    times as many, or `top_k`; with the former the logits are what they were. The folder `out`,
    which must not exist, is then as of a run: a checkpoint of step 0, without the optimizer's
    moments. One parameter at a time is in memory, twice. Returns what must be said of it.

    Raises UserError where the model has no experts, or a router that cannot choose so, where its
    widths do not allow it, and where `out` is in the way or cannot be written.
    """
    return _resize(path, out, lambda config, make: cut(config, make, parts, by, top_k))


def merge(path: Path, out: Path, parts: int, by: MergeBy, top_k: int | None = None) -> list[str]:
    """Write a model in which every `parts` neighbouring experts have become one.

    `join` makes it as wide as all of them, `average` takes their mean; both undo a split. A token
    chooses a `parts`-th of what it chose, or `top_k`. All else as `split`.
    """
    return _resize(path, out, lambda config, make: uncut(config, make, parts, by, top_k))


Change = Callable[[Config, Make], tuple[Config, Make]]


def _resize(path: Path, out: Path, change: Change) -> list[str]:
    found = restore.find(path)
    manifest = open_checkpoint(found.path, hashed=True)

    def read(name: str) -> Tensor:
        return read_tensor(found.path, manifest.tensors[f"model.{name}"])

    config, make = change(found.config, read)
    home = found.path.parent.parent
    beside = {file: home / file for file in KEPT if (home / file).is_file()}
    write(out, config, Opened(config, restore.tokenizer(found), beside, make))
    return _remarks(found.config, config)


def _remarks(before: Config, after: Config) -> list[str]:
    one, other = before.moe, after.moe
    if one.router == other.router:
        return []
    return [
        f"moe.router ({one.router}) always has {one.top_k} choice{'s' * (one.top_k > 1)}; with "
        f"{other.top_k} it is topk, with moe.renormalize {spell(other.renormalize)} and nothing "
        "drawn at random"
    ]


def cut(
    config: Config, make: Make, parts: int, by: SplitBy, top_k: int | None = None
) -> tuple[Config, Make]:
    """The settings and tensors of a model with `parts` times the experts; see `split`."""
    _require_choosing(config)
    width, moe = config.expert_ffn_dim, config.moe
    if by == "cut" and width % parts:
        raise UserError(
            f"moe.expert_ffn_dim ({width}) cannot be cut into {parts} equal parts; try "
            f"{nearest(divisors(width)[1:] or [1], parts)}"
        )
    narrow = width // parts if by == "cut" else width
    resized = _with_experts(config, moe.experts * parts, top_k or moe.top_k * parts, narrow)
    change = CUT if by == "cut" else COPY
    return resized, lambda name: _changed(name, make(name), change, parts)


def uncut(
    config: Config, make: Make, parts: int, by: MergeBy, top_k: int | None = None
) -> tuple[Config, Make]:
    """The settings and tensors of a model with a `parts`-th of the experts; see `merge`."""
    _require_choosing(config)
    width, moe = config.expert_ffn_dim, config.moe
    if moe.experts % parts:
        raise UserError(
            f"moe.experts ({moe.experts}) must be divisible by --parts ({parts}); try "
            f"{nearest(divisors(moe.experts)[1:] or [1], parts)}"
        )
    if top_k is None and moe.top_k % parts:
        raise UserError(
            f"moe.top_k ({moe.top_k}) is not divisible by --parts ({parts}); say with --top-k how "
            "many experts a token is to choose"
        )
    wide = width * parts if by == "join" else width
    resized = _with_experts(config, moe.experts // parts, top_k or moe.top_k // parts, wide)
    change = JOIN if by == "join" else AVERAGE
    return resized, lambda name: _changed(name, make(name), change, parts)


def _require_choosing(config: Config) -> None:
    if not config.moe.experts:
        raise UserError("moe.experts (0) leaves nothing to split or merge; see moetrain upcycle")
    if config.moe.router not in ROUTERS:
        raise UserError(
            f"moe.router ({config.moe.router}) cannot choose among other experts than it had; it "
            f"must be one of {', '.join(ROUTERS)}"
        )


def _with_experts(config: Config, experts: int, top_k: int, width: int) -> Config:
    moe, sections = config.moe, config.model_dump()
    sections["moe"] |= {"experts": experts, "top_k": top_k, "expert_ffn_dim": width}
    if moe.router in RENORMALIZES and top_k != moe.top_k:
        renormalize = RENORMALIZES[moe.router]
        drawn = {name: MoEConfig.model_fields[name].default for name in ("jitter", "random_second")}
        sections["moe"] |= {"router": "topk", "renormalize": renormalize, **drawn}
    # What is written is no part of a run, and on one rank until a run goes on from it.
    sections |= {"init_from": None, "parallel": {}}
    return settings.resolve(None, sections)


# ---- tensors -------------------------------------------------------------------------------------


def _changed(name: str, tensor: Tensor, change: dict[str, Any], parts: int) -> Tensor:
    """A tensor of the resized model, from the one of that name."""
    if ".moe." not in name:
        return tensor
    kind = name.rpartition(".")[2] if ".experts." in name else "router"
    return change[kind](tensor, parts)


def _repeat(tensor_E: Tensor, n: int) -> Tensor:
    return tensor_E.repeat_interleave(n, dim=0)


def _mean(tensor_E: Tensor, n: int) -> Tensor:
    parts_En = tensor_E.unflatten(0, (-1, n))
    first_E1 = parts_En[:, :1]
    return (first_E1 + (parts_En - first_E1).mean(dim=1, keepdim=True)).squeeze(1)  # exact if equal


def _cut_gate_up(weight_ED2F: Tensor, n: int) -> Tensor:
    """(E·n, D, 2f), gate and up projection each in n parts."""
    parts_ED2nf = weight_ED2F.unflatten(2, (2, n, -1))
    return parts_ED2nf.permute(0, 3, 1, 2, 4).flatten(3).flatten(0, 1)


def _join_gate_up(weight_ED2f: Tensor, n: int) -> Tensor:
    parts_EnD2f = weight_ED2f.unflatten(2, (2, -1)).unflatten(0, (-1, n))
    return parts_EnD2f.permute(0, 2, 3, 1, 4).flatten(2)


def _cut_down(weight_EFD: Tensor, n: int) -> Tensor:
    """(E·n, f, D), times n: each part's gate is an n-th of the whole's."""
    return weight_EFD.unflatten(1, (n, -1)).flatten(0, 1) * n


def _join_down(weight_EfD: Tensor, n: int) -> Tensor:
    return weight_EfD.unflatten(0, (-1, n)).flatten(1, 2) / n


CUT = {"w_gate_up": _cut_gate_up, "w_down": _cut_down, "router": _repeat}
JOIN = {"w_gate_up": _join_gate_up, "w_down": _join_down, "router": _mean}
COPY = dict.fromkeys(CUT, _repeat)
AVERAGE = dict.fromkeys(CUT, _mean)
