"""Checkpoints as models of Hugging Face: settings, tensors, logits and what they generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import model_of, train, write_config
from safetensors import safe_open

from moetrain import checkpoint, settings
from moetrain.cli import main
from moetrain.convert import INDEX
from moetrain.data.tokenizer import ByteTokenizer
from moetrain.errors import UserError
from moetrain.generate import continuations, greedy
from moetrain.hf.exporting import export
from moetrain.hf.formats import FORMATS, approximations, refusals
from moetrain.hf.names import FormatName

DROPLESS = {"capacity_factor": None, "eval_capacity_factor": None}
MODELS: dict[str, tuple[FormatName, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"model": {"kv_heads": 2, "head_dim": 8}}),
    "mixtral, untied": ("mixtral", {"model": {"tie_embeddings": False}}),
    "mixtral, gshard": (
        "mixtral",
        {"moe": {"router": "gshard", "random_second": False}},
    ),
    "olmoe": ("olmoe", {"model": {"qk_norm": "full"}, "moe": {"renormalize": False}}),
    "olmoe, switch": (
        "olmoe",
        {"model": {"qk_norm": "full"}, "moe": {"router": "switch", "top_k": 1}},
    ),
    "qwen3": (
        "qwen3_moe",
        {"model": {"qk_norm": "head", "kv_heads": 2, "head_dim": 8}},
    ),
    "qwen3, some dense": (
        "qwen3_moe",
        {"model": {"qk_norm": "head", "layers": 4}, "moe": {"every": 2, "first_dense": 1}},
    ),
    "llama": ("llama", {"model": {"kv_heads": 2, "head_dim": 8}, "moe": {"experts": 0}}),
    "mistral": ("mistral", {"moe": {"experts": 0}}),
    "qwen3, dense": ("qwen3", {"model": {"qk_norm": "head"}, "moe": {"experts": 0}}),
}


def trained(folder: Path, sections: dict[str, Any]) -> Path:
    """The folder of a run of two steps, whose weights are all other than they began."""
    moe = {**DROPLESS, "first_dense": 0, **sections.get("moe", {})}
    others = {name: value for name, value in sections.items() if name != "moe"}
    path = write_config(folder, moe=moe, train={"steps": 2}, checkpoint={"every": 2}, **others)
    assert train(path) == 0
    (run,) = (folder / "runs").iterdir()
    return run


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, FormatName]:
    """A run, its export in fp32, and the format."""
    name, sections = MODELS[request.param]
    folder = tmp_path_factory.mktemp("export")
    run = trained(folder, sections)
    assert export(run, folder / "out", name, dtype="fp32") == []
    return run, folder / "out", name


def loaded(out: Path) -> Any:
    """Their model; every tensor found its place, and none was left over."""
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def test_logits_are_the_same(exported: tuple[Path, Path, FormatName]) -> None:
    run, out, name = exported
    ours = model_of(run)
    theirs = loaded(out)
    assert theirs.config.architectures == [FORMATS[name].architecture]
    for length in (1, 7, 200):  # the run was trained on less
        tokens_BL = torch.randint(257, (2, length), generator=torch.Generator().manual_seed(length))
        with torch.no_grad():
            mine, expected = ours(tokens_BL).logits_BLV, theirs(tokens_BL).logits
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_greedy_generation_is_the_same(exported: tuple[Path, Path, FormatName]) -> None:
    run, out, _ = exported
    ours = model_of(run)
    prompt_BL = torch.tensor([list(b"def main("), list(b"import os")])
    mine = torch.stack(list(continuations(ours, prompt_BL, 20, greedy)), dim=1)
    theirs = loaded(out)
    theirs.generation_config.eos_token_id = None  # both go on
    found = theirs.generate(prompt_BL, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(found[:, prompt_BL.shape[1] :], mine)


def test_names_are_those_of_published_checkpoints(
    exported: tuple[Path, Path, FormatName],
) -> None:
    """As in mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924 and Qwen/Qwen3-30B-A3B."""
    _, out, name = exported
    matrix = {
        "mixtral": "block_sparse_moe.experts.3.w2",
        "olmoe": "mlp.experts.3.down_proj",
        "qwen3_moe": "mlp.experts.3.down_proj",
    }.get(name, "mlp.down_proj")
    layer = 3 if json.loads((out / "config.json").read_text())["num_hidden_layers"] == 4 else 0
    with safe_open(out / "model.safetensors", "pt") as tensors:
        assert f"model.layers.{layer}.{matrix}.weight" in tensors.keys()  # noqa: SIM118


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mixtral's."""
    return trained(tmp_path_factory.mktemp("run"), {})


def test_shards_have_an_index_and_hold_the_same(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "whole", "mixtral", "bf16")
    export(run, tmp_path / "cut", "mixtral", "bf16", shard_bytes=10_000)
    places = json.loads((tmp_path / "cut" / INDEX).read_text())["weight_map"]
    assert len(set(places.values())) > 2
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as whole:
        assert set(places) == set(whole.keys())
        for name, file in places.items():
            with safe_open(tmp_path / "cut" / file, "pt") as part:
                assert torch.equal(part.get_tensor(name), whole.get_tensor(name))
                assert part.get_tensor(name).dtype == torch.bfloat16
    assert loaded(tmp_path / "cut").config.dtype == torch.float32


def test_the_tokenizer_gives_the_same_ids(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out", "mixtral")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    texts = ["def f():\n\treturn 'é€😀'\r\n", "", "\x00\x7f\xa0\xad ÿ", "<|endoftext|"]
    for text, ids in zip(texts, ByteTokenizer().encode_batch(texts), strict=True):
        assert tokenizer.encode(text) == ids.tolist()
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == ByteTokenizer.eos_id


@pytest.mark.parametrize(
    ("name", "moe", "model", "message"),
    [
        ("olmoe", {}, {}, "olmoe: model.qk_norm (none) must be full"),
        ("mixtral", {}, {"qk_norm": "head"}, "mixtral: model.qk_norm (head) must be none"),
        ("mixtral", {"renormalize": False}, {}, "moe.renormalize (false, as topk has it) must be"),
        ("mixtral", {"router": "switch", "top_k": 1}, {}, "false, as switch has it) must be true"),
        ("mixtral", {"router": "sigmoid"}, {}, "moe.router (sigmoid) must be one of topk, switch"),
        ("mixtral", {"shared_experts": 1}, {}, "moe.shared_experts (1) must be 0"),
        ("mixtral", {"first_dense": 1}, {}, "moe.first_dense (1) must leave no block without"),
        ("olmoe", {}, {"qk_norm": "full", "head_dim": 4}, "model.head_dim (4) must be dim/heads"),
        ("mixtral", {"experts": 0}, {}, "moe.experts (0) must be 1 or more"),
        ("llama", {}, {}, "llama: moe.experts (8) must be 0"),
        ("mixtral", {"capacity_factor": 1.25}, {}, "moe.capacity_factor (1.25) drops assignments"),
        ("mixtral", {"router": "gshard"}, {}, "moe.random_second (true) leaves out second experts"),
    ],
)
def test_what_a_format_cannot_express_is_told(
    name: FormatName, moe: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    small = {"dim": 16, "heads": 2, **model}
    config = settings.resolve(None, {"model": small, "moe": {**DROPLESS, **moe}})
    (told,) = [*refusals(name, config), *approximations(config)]
    assert message in told


def test_a_refusal_is_a_message_and_leaves_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), str(tmp_path / "out"), "--format", "olmoe"]) == 2
    said = capsys.readouterr().err
    assert said == "moetrain: error: olmoe: model.qk_norm (none) must be full\n"
    assert not (tmp_path / "out").exists()


def test_an_approximation_that_is_asked_for_is_stated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path, {"moe": {"capacity_factor": 1.25, "eval_capacity_factor": 2.0}})
    words = ["export", str(run), str(tmp_path / "out"), "--format", "mixtral", "--approximate"]
    capsys.readouterr()
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n"
    for setting in ("moe.capacity_factor (1.25)", "moe.eval_capacity_factor (2.0)"):
        assert f"mixtral: {setting} drops assignments; there, none is dropped" in said.err
    loaded(tmp_path / "out")
    assert main(words) == 2  # OUT is in the way


def test_tensors_that_do_not_match_are_listed(run: Path, tmp_path: Path) -> None:
    found = checkpoint.resolve(run)
    manifest = checkpoint.read_manifest(found)
    with pytest.MonkeyPatch.context() as patch:
        renamed = {
            ("model.other" if name == "model.norm.weight" else name): entry
            for name, entry in manifest.tensors.items()
        }
        other = manifest.model_copy(update={"tensors": renamed})
        patch.setattr("moetrain.hf.exporting.open_checkpoint", lambda *_, **__: other)
        with pytest.raises(UserError) as raised:
            export(run, tmp_path / "out", "mixtral")
    assert str(raised.value) == (
        "missing in the checkpoint: model.norm.weight\nwithout a place in the format: model.other"
    )
