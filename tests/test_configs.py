"""The shipped configurations: what their comments say, and the published models they stand for."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from moetrain import check, cli, settings
from moetrain.build import build_model
from moetrain.cautions import cautions
from moetrain.commands.runs import Check
from moetrain.config import Config
from moetrain.constraints import check_world
from moetrain.data import is_on_hub, load_tokenizer
from moetrain.sizes import Sizes, sizes

FOLDER = Path(__file__).parents[1] / "configs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != "finetune")
"""All that name a model; finetune.yaml takes any (test_finetune.py)."""
ALL = pytest.mark.parametrize("name", NAMES)


def load(name: str) -> Config:
    return settings.load(FOLDER / f"{name}.yaml")


def comment(name: str) -> list[str]:
    """The lines before the first setting, without their mark."""
    lines = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    return [line[1:].strip() for line in lines[: lines.index(f"name: {name}")]]


def paragraph(name: str) -> str:
    return " ".join(comment(name))


def check_command(name: str) -> Check:
    line = next(line for line in comment(name) if line.startswith("moetrain check"))
    command = cli.parse(shlex.split(line)[1:])
    assert isinstance(command, Check)
    return command


@functools.cache
def reported(name: str) -> str:
    command = check_command(name)
    config = settings.resolve(FOLDER.parent / command.config, command.flags)
    check_world(config, command.world_size)
    return check.report(config, command.world_size)


def counted(name: str) -> Sizes:
    config = load(name)
    tokenizer = config.data.tokenizer
    vocab_size = config.model.vocab_size or 0
    if not is_on_hub(tokenizer):
        vocab_size = load_tokenizer(tokenizer).vocab_size
    return sizes(build_model(config, vocab_size))


def test_those_that_people_recognise_are_there() -> None:
    assert set(NAMES) == {
        "quickstart",
        "switch-base-128",
        "gshard-top2",
        "mixtral-8x7b",
        "olmoe-1b-7b",
        "qwen3-30b-a3b",
        "deepseek-v3-style",
    }


# ---------------------------------------------------------------- the comment


@ALL
def test_the_command_is_of_this_file_and_starts_as_many_ranks_as_are_checked(name: str) -> None:
    launch, words = comment(name)[0], shlex.split(comment(name)[0])
    command = check_command(name)
    assert command.config == Path(f"configs/{name}.yaml")
    if name == "quickstart":
        script = (FOLDER.parent / launch).read_text(encoding="utf-8")
        assert f"NPROC={command.world_size}\n" in script
        return
    assert words[-2:] == ["launch/slurm.sbatch", f"configs/{name}.yaml"]
    options = dict(word.removeprefix("--").split("=") for word in words[1:-2])
    assert int(options["nodes"]) * int(options["gpus-per-node"]) == command.world_size
    assert f"Hardware: {command.world_size:,} GPUs of " in paragraph(name)


@ALL
def test_the_counts_are_those_of_check(name: str) -> None:
    found = re.search(r"Expect: ([\d,]+) parameters, ([\d,]+) of them active", paragraph(name))
    assert found is not None
    assert f"parameters {found[1]} in total, {found[2]} active per token\n" in reported(name)


@ALL
def test_it_fits_the_hardware_by_the_figure_that_check_prints(name: str) -> None:
    together = re.search(r"together +([\d.]+)\n", reported(name))
    said = re.search(r"about (\d+) GiB of memory on each", paragraph(name))
    room = re.search(r"GPUs of (\d+) GB", paragraph(name))
    assert together is not None
    if name == "quickstart":
        assert float(together[1]) < 1
        return
    assert said is not None
    assert room is not None
    assert int(said[1]) == round(float(together[1]))
    assert int(said[1]) * 2**30 < 0.9 * float(room[1]) * 1e9  # the rest is for what is left out


@ALL
def test_every_setting_acts(name: str) -> None:
    assert cautions(load(name)) == []


# ---------------------------------------------------------------- docs/sizing.md

PAGE = (FOLDER.parent / "docs" / "sizing.md").read_text(encoding="utf-8")


def test_the_page_shows_what_check_prints() -> None:
    fences = re.findall(r"^```(?:sh|text)\n(.*?)\n```$", PAGE, re.MULTILINE | re.DOTALL)
    command, printed = fences
    assert command == next(line for line in comment("mixtral-8x7b") if "check" in line)
    assert printed == reported("mixtral-8x7b")


@ALL
def test_the_table_is_of_check(name: str) -> None:
    (row,) = re.findall(rf"^\| \[{name}\]\(.*?\) \| (.*) \|$", PAGE, re.MULTILINE)
    ranks, total, active, in_print, memory = row.split(" | ")
    assert ranks == f"{check_command(name).world_size:,}"
    assert f"parameters {total} in total, {active} active per token\n" in reported(name)
    if name in PUBLISHED:
        assert in_print == f"{PUBLISHED[name].total}B, {PUBLISHED[name].active}B"
    together = re.search(r"together +([\d.]+)\n", reported(name))
    assert together is not None
    assert memory == f"{float(together[1]):.1f}"


# ---------------------------------------------------------------- published models


class Published(NamedTuple):
    """A model of the hub: the class of transformers, its config.json, and the counts in print."""

    family: str
    fields: dict[str, Any]
    total: float
    active: float


PUBLISHED = {
    "mixtral-8x7b": Published(
        "Mixtral",
        {
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        46.7,
        12.9,
    ),
    "olmoe-1b-7b": Published(
        "Olmoe",
        {
            "vocab_size": 50_304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_hidden_layers": 16,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
        6.9,
        1.3,
    ),
    "qwen3-30b-a3b": Published(
        "Qwen3Moe",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        30.5,
        3.3,
    ),
}
EACH = pytest.mark.parametrize("name", PUBLISHED)


def theirs(name: str, **changes: Any) -> Any:
    """The model as transformers builds it."""
    import transformers

    family, fields = PUBLISHED[name].family, PUBLISHED[name].fields
    made = getattr(transformers, f"{family}Config")(
        **{**fields, **changes},
        tie_word_embeddings=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return getattr(transformers, f"{family}ForCausalLM")(made)


@EACH
def test_counts_equal_those_of_transformers(name: str) -> None:
    with torch.device("meta"):
        model = theirs(name)
    total = sum(weight.numel() for weight in model.parameters())
    of_experts = sum(w.numel() for n, w in model.named_parameters() if ".experts." in n)
    experts = load(name).moe.experts
    active = total - of_experts // experts * (
        experts - PUBLISHED[name].fields["num_experts_per_tok"]
    )
    assert counted(name)[:2] == (total, active)


@EACH
def test_counts_are_those_in_print(name: str) -> None:
    """To the digits there; Qwen's 3.353 is cut to 3.3, the others are rounded."""
    found = counted(name)
    for count, printed in ((found.total, "total"), (found.active, "active")):
        in_print = getattr(PUBLISHED[name], printed)
        rounded, cut = round(count / 1e9, 1), count // 10**8 / 10
        assert in_print == (cut if (name, printed) == ("qwen3-30b-a3b", "active") else rounded)


SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
NAMES_OF_PARTS = {
    "model.embed_tokens": "embedding",
    "model.layers": "blocks",
    "self_attn": "attention",
    "_proj.weight": ".weight",
    "attention.": "attention.w",
    "wq_norm": "q_norm",
    "wk_norm": "k_norm",
    "mlp.gate": "moe.router",
    "mlp.experts": "moe.experts",
    "gate_up_proj": "w_gate_up",
    "down_proj": "w_down",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.norm": "norm",
    "lm_head": "head",
}
"""Theirs and ours, in the order in which they are replaced."""


def our_name(name: str) -> str:
    for part, ours in NAMES_OF_PARTS.items():
        name = name.replace(part, ours)
    return name


@EACH
@torch.no_grad()
def test_a_small_one_computes_what_theirs_computes(name: str) -> None:
    """The same numbers from the same weights: norms, rotation, heads, gates."""
    head_dim, width = {}, {}
    if name == "qwen3-30b-a3b":
        head_dim, width = {"head_dim": 12}, {"moe_intermediate_size": 24}
    model_of_theirs = theirs(name, **SMALL, **head_dim, **width).double().eval()
    made = settings.resolve(
        FOLDER / f"{name}.yaml",
        {
            "model": {
                "vocab_size": 300,
                "dim": 32,
                "layers": 2,
                "heads": 4,
                "kv_heads": 2,
                **head_dim,
            },
            "moe": {"expert_ffn_dim": 24},
            "parallel": {"ep": 1},
        },
    )
    ours = build_model(made, 257).to_empty(device="cpu").double()
    generator = torch.Generator().manual_seed(0)
    weights = dict(ours.named_parameters())
    for their_name, weight in model_of_theirs.named_parameters():
        spread = 1.0 if "norm" in their_name else weight.shape[-1] ** -0.5
        weight.copy_(spread * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
        mine = weights.pop(our_name(their_name))
        mine.copy_(weight.transpose(1, 2) if weight.dim() == 3 else weight)
    assert weights == {}
    tokens_BL = torch.randint(300, (2, 12), generator=generator)
    logits_BLV = ours(tokens_BL, mode="eval").logits_BLV
    expected_BLV = model_of_theirs(tokens_BL).logits
    assert expected_BLV.std() > 0.1
    # Theirs normalises and rotates in fp32.
    torch.testing.assert_close(logits_BLV, expected_BLV, rtol=1e-4, atol=1e-5)
