"""Models of Hugging Face as checkpoints: settings, tensors, logits, generation, training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import model_of, read_metrics, saved_tensors, train, write_start
from safetensors import safe_open
from safetensors.torch import save_file
from torch.multiprocessing.reductions import StorageWeakRef

from moetrain import checkpoint, restore
from moetrain.cli import main
from moetrain.config import Config
from moetrain.convert import INDEX
from moetrain.data import Samples, bytes_as_json, prepare
from moetrain.errors import UserError
from moetrain.generate import continuations, greedy
from moetrain.hf.exporting import export
from moetrain.hf.formats import sections_of
from moetrain.hf.importing import import_model
from moetrain.hf.names import SOURCE, FormatName
from moetrain.inherited import resolve_run
from moetrain.mesh import Mesh
from moetrain.resume import begin
from moetrain.testing import RankPool, simulate_ranks
from moetrain.train import set_up

SMALL: dict[str, Any] = {
    "vocab_size": 272,  # more than there are bytes: padded, as published models are
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,  # so that experts differ
    "bos_token_id": None,
    "eos_token_id": 256,
    "pad_token_id": None,
    "output_router_logits": False,
}
TOP_2 = {"num_experts_per_tok": 2}
NARROW = {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24}
MODELS: dict[str, tuple[FormatName, dict[str, Any]]] = {
    "mixtral": (
        "mixtral",
        {**NARROW, "num_local_experts": 4, **TOP_2, "router_aux_loss_coef": 0.02},
    ),
    "mixtral, tied": (
        "mixtral",
        {**NARROW, "num_local_experts": 4, **TOP_2, "tie_word_embeddings": True},
    ),
    "olmoe": (
        "olmoe",
        {"num_key_value_heads": 2, "intermediate_size": 12, "num_experts": 4, **TOP_2},
    ),
    "qwen3": (
        "qwen3_moe",
        {
            **NARROW,
            "num_hidden_layers": 4,
            "num_experts": 4,
            **TOP_2,
            "moe_intermediate_size": 12,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [0, 1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        },
    ),
    "llama": ("llama", NARROW),
    "mistral": ("mistral", {**NARROW, "sliding_window": None}),
    "qwen3, dense": ("qwen3", {**NARROW, "tie_word_embeddings": True}),
}


def random_model(name: FormatName, shape: dict[str, Any]) -> Any:
    """A model of transformers with weights that are none of them ones or zeros."""
    torch.manual_seed(0)
    given = transformers.AutoConfig.for_model(name, **{**SMALL, **shape})
    model = transformers.AutoModelForCausalLM.from_config(given)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 1:
                weight += 0.2 * torch.randn_like(weight)
    return model.eval()


def saved(folder: Path, name: FormatName, shape: dict[str, Any], **options: Any) -> Any:
    """The model, after it was written to a folder with a tokenizer of bytes."""
    model = random_model(name, shape)
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.json").write_text(bytes_as_json(), encoding="utf-8")
    return model


@pytest.fixture(scope="module", params=MODELS, ids=list(MODELS))
def imported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, Path, Path, FormatName]:
    """A model, the folder that it was saved to, and what was imported from there."""
    name, shape = MODELS[request.param]
    folder = tmp_path_factory.mktemp("import")
    theirs = saved(folder / "theirs", name, shape)
    import_model(str(folder / "theirs"), folder / "ours")
    return theirs, folder / "theirs", folder / "ours", name


def random_tokens(length: int) -> torch.Tensor:
    return torch.randint(257, (2, length), generator=torch.Generator().manual_seed(length))


def test_logits_are_the_same(imported: tuple[Any, Path, Path, FormatName]) -> None:
    theirs, _, run, _ = imported
    ours = model_of(run)
    for length in (1, 7, 200):  # also longer than max_position_embeddings
        tokens_BL = random_tokens(length)
        with torch.no_grad():
            mine, expected = ours(tokens_BL).logits_BLV, theirs(tokens_BL).logits
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_greedy_generation_is_the_same(imported: tuple[Any, Path, Path, FormatName]) -> None:
    theirs, _, run, _ = imported
    prompt_BL = random_tokens(8)
    mine = torch.stack(list(continuations(model_of(run), prompt_BL, 20, greedy)), dim=1)
    theirs.generation_config.eos_token_id = None
    found = theirs.generate(prompt_BL, max_new_tokens=20, do_sample=False, pad_token_id=0)
    assert torch.equal(found[:, 8:], mine)


def test_an_export_of_it_is_the_same_byte_for_byte(
    imported: tuple[Any, Path, Path, FormatName], tmp_path: Path
) -> None:
    _, source, run, name = imported
    assert export(run, tmp_path / "again", name, dtype="fp32") == []
    with (
        safe_open(source / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as after,
    ):
        assert set(before.keys()) == set(after.keys())
        for key in before.keys():  # noqa: SIM118
            one, other = before.get_tensor(key), after.get_tensor(key)
            assert one.dtype == other.dtype
            assert torch.equal(one.view(torch.int32), other.view(torch.int32))
    was, now = (json.loads((f / "config.json").read_text()) for f in (source, tmp_path / "again"))
    assert sections_of(name, now) == sections_of(name, was)
    ids = "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"
    assert [now[key] for key in ids] == [was[key] for key in ids]
    assert (tmp_path / "again" / "generation_config.json").read_bytes() == (
        source / "generation_config.json"
    ).read_bytes()


def test_weights_in_bf16_come_back_as_they_were(tmp_path: Path) -> None:
    name, shape = MODELS["olmoe"]
    random_model(name, shape).bfloat16().save_pretrained(tmp_path / "theirs")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tokenizer="bytes")
    export(tmp_path / "ours", tmp_path / "again", name, dtype="bf16")
    with (
        safe_open(tmp_path / "theirs" / "model.safetensors", "pt") as before,
        safe_open(tmp_path / "again" / "model.safetensors", "pt") as after,
    ):
        for key in before.keys():  # noqa: SIM118
            assert torch.equal(before.get_tensor(key), after.get_tensor(key))


def test_shards_are_read_and_one_tensor_at_a_time_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, shape = MODELS["mixtral"]
    saved(tmp_path / "theirs", name, shape, max_shard_size="8KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    made: list[StorageWeakRef] = []
    plain = checkpoint.save

    def watched(*args: Any, make: Any, **others: Any) -> Path:
        def one(name: str) -> torch.Tensor:
            assert sum(not old.expired() for old in made) <= 1  # the last is on its way to the disk
            tensor = make(name)
            made.append(StorageWeakRef(tensor.untyped_storage()))
            return tensor

        assert all(tensor.is_meta for tensor in args[2].values())
        return plain(*args, make=one, **others)

    monkeypatch.setattr(checkpoint, "save", watched)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    assert len(made) == len(checkpoint.read_manifest(checkpoint.resolve(tmp_path / "ours")).tensors)


def test_ranks_that_share_the_experts_have_the_same_model(
    imported: tuple[Any, Path, Path, FormatName],
) -> None:
    theirs, _, run, _ = imported
    found, tokens_BL = restore.find(run), random_tokens(9)

    def logits() -> torch.Tensor:
        mesh = Mesh(torch.device("cpu"), ep=4)
        with torch.no_grad():
            return restore.model_on_mesh(found, mesh)(tokens_BL).logits_BLV

    with torch.no_grad():
        expected = theirs(tokens_BL).logits
    for mine in simulate_ranks(4, logits):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_their_loss(
    imported: tuple[Any, Path, Path, FormatName], tmp_path: Path
) -> None:
    """`init_from` brings shape and tokenizer; the loss of the first step is theirs."""
    theirs, _, run, _ = imported
    config = write_start(tmp_path, run)
    assert train(config) == 0
    first, *_ = read_metrics(tmp_path / "runs" / "on")
    made = resolve_run(config, {})
    assert made.moe == restore.find(run).config.moe
    assert made.init_from == restore.find(run).path
    batch = Samples(prepare(made.data), "train", 32, made.seed, False).batch([0, 1])
    with torch.no_grad():
        given = {"labels": batch.targets_BL, "shift_labels": batch.targets_BL}
        expected = theirs(batch.tokens_BL, **given).loss
    assert first["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_a_run_from_an_import_goes_on_without_it_and_leaves_as_it_came(tmp_path: Path) -> None:
    """Resumed when the import is gone; exported with all that the source had beside its tensors."""
    name, shape = MODELS["mixtral"]
    saved(tmp_path / "theirs", name, shape)
    (tmp_path / "theirs" / "chat_template.jinja").write_text("{{ messages }}")
    change(tmp_path / "theirs", eos_token_id=7)
    import_model(str(tmp_path / "theirs"), tmp_path / "ours")
    saves = {"every": 1, "asynchronous": False}
    config = write_start(tmp_path, tmp_path / "ours", data={"seq_len": 16}, checkpoint=saves)
    assert train(config) == 0
    shutil.rmtree(tmp_path / "ours")
    assert train(config, "--train.steps", 3) == 0
    run = tmp_path / "runs" / "on"
    assert restore.find(run).step == 3
    export(run, tmp_path / "again", name)
    described = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (described["eos_token_id"], described["max_position_embeddings"]) == (7, 32)
    assert (tmp_path / "again" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert not (tmp_path / "again" / SOURCE).exists()


def test_another_tokenizer_leaves_nothing_of_theirs(tmp_path: Path) -> None:
    name, shape = MODELS["mixtral"]
    saved(tmp_path / "theirs", name, shape)
    (tmp_path / "theirs" / "tokenizer_config.json").write_text("{}")
    import_model(str(tmp_path / "theirs"), tmp_path / "ours", tokenizer="bytes")
    assert {path.name for path in (tmp_path / "ours").iterdir()} == {"config.yaml", "checkpoints"}
    export(tmp_path / "ours", tmp_path / "again", name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert tokenizer.encode("é") == [195, 169]


@pytest.mark.parametrize("engine", ["torch", "deepspeed"])
def test_ranks_start_from_the_weights_too(
    imported: tuple[Any, Path, Path, FormatName], tmp_path: Path, engine: str, ranks2: RankPool
) -> None:
    _, _, run, _ = imported
    ep = 2 if restore.find(run).config.moe.experts else 1
    spread: dict[str, Any] = {"parallel": {"ep": ep}, "engine": {"kind": engine}}
    config = write_start(tmp_path, run, train={"micro_batch": 1}, **spread)
    ranks2.run(save_the_start, resolve_run(config, {}), tmp_path / "started")
    found = saved_tensors(checkpoint.resolve(tmp_path / "started"))
    for name, weight in model_of(run).named_parameters():
        assert torch.equal(found[f"model.{name}"], weight), name


def save_the_start(config: Config, folder: Path) -> None:
    """What a run begins with, as a checkpoint."""
    run = set_up(config, folder, Mesh(torch.device("cpu"), config.parallel.ep))
    begin(run)
    checkpoint.save(folder, 1, run.engine.state(), {})


# ---- what is wrong -------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path: Path) -> Path:
    """A folder with a Mixtral in one file."""
    name, shape = MODELS["mixtral"]
    saved(tmp_path / "theirs", name, shape)
    return tmp_path / "theirs"


def refused(source: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says; nothing is left."""
    assert main(["import", str(source), str(source.parent / "out")]) == 2
    assert not (source.parent / "out").exists()
    assert {path.name for path in source.parent.iterdir()} <= {source.name}
    return capsys.readouterr().err


def change(theirs: Path, **given: Any) -> None:
    path = theirs / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **given}))


def test_tensors_that_do_not_fit_are_listed(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with safe_open(theirs / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.layers.7.odd"] = tensors.pop("model.norm.weight")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    prefix = "model.layers.0.block_sparse_moe"
    tensors[f"{prefix}.gate.weight"] = tensors[f"{prefix}.gate.weight"].to(torch.int8)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # says nothing new
    save_file(tensors, theirs / "model.safetensors")
    assert refused(theirs, capsys) == (
        "moetrain: error: missing: model.norm.weight\n"
        "without a place in the model: model.layers.7.odd\n"
        "of another shape than config.json says: lm_head.weight [271, 16] instead of [272, 16]\n"
        f"of another type than F32, BF16, F16: {prefix}.gate.weight (I8)\n"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model_type": "gemma"}, "model_type (gemma) must be one of mixtral, olmoe, qwen3_moe"),
        ({"quantization_config": {"bits": 4}}, "mixtral: quantization_config must not be there"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers (two) must be a number above 0"),
        ({"hidden_act": "gelu"}, "mixtral: hidden_act (gelu) must be silu"),
        ({"sliding_window": 8}, "mixtral: sliding_window (8) must be null"),
        ({"attention_bias": True}, "mixtral: attention_bias (true) must be false"),
        ({"hidden_size": None}, "config.json: hidden_size (None) must be a number above 0"),
        (
            {"num_attention_heads": 3, "num_key_value_heads": 2},
            "model.kv_heads (2) must divide model.heads (3)",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "mixtral: rope_type (yarn) must be default",
        ),
        ({"vocab_size": 100}, "model.vocab_size (100) must be at least the 257 ids"),
    ],
)
def test_what_cannot_be_done_here_is_told(
    theirs: Path, given: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(theirs, **given)
    assert message in refused(theirs, capsys)


def test_blocks_without_experts_must_come_first() -> None:
    _, shape = MODELS["qwen3"]
    described = {"model_type": "qwen3_moe", "rms_norm_eps": 1e-6, **SMALL, **shape}
    given = {**described, "mlp_only_layers": [3]}
    with pytest.raises(UserError, match=r"mlp_only_layers \(\[3\]\) must be the first ones"):
        sections_of("qwen3_moe", given)
    moe = sections_of("qwen3_moe", {**described, "mlp_only_layers": [0, 2]})["moe"]
    assert (moe["every"], moe["first_dense"]) == (2, 1)  # the third has none anyway


def test_files_that_are_not_there_or_damaged_are_told(
    theirs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, tokenizer = theirs / "model.safetensors", theirs / "tokenizer.json"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert f"{weights} cannot be read: " in refused(theirs, capsys)
    weights.unlink()
    assert "has neither model.safetensors nor model.safetensors.index.json" in refused(
        theirs, capsys
    )
    tokenizer.unlink()
    assert "has no tokenizer.json; name a tokenizer with --tokenizer" in refused(theirs, capsys)
    (theirs / "config.json").write_text("{")
    assert "config.json is not JSON" in refused(theirs, capsys)
    assert main(["import", str(theirs / "nowhere"), str(theirs / "out")]) == 2
    assert "is no folder; name one, or a model on the hub" in capsys.readouterr().err


def test_another_tokenizer_than_the_weights_were_trained_with_is_refused(
    imported: tuple[Any, Path, Path, FormatName],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, _, run, _ = imported
    base = write_start(tmp_path, run)
    assert train(base, "--data.tokenizer", "bytes") == 2
    said = capsys.readouterr().err
    assert f"is not the one that init_from ({restore.find(run).path}) was trained with" in said
    assert train(base, "--init-from", str(tmp_path)) == 2
    assert f"init_from ({tmp_path}): {tmp_path} is no run with" in capsys.readouterr().err
